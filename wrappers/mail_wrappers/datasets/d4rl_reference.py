"""Reference returns of the D4RL environments, which turn returns into normalised scores.

``d4rl_reference.json`` holds the pairs of ``d4rl/infos.py`` in Farama-Foundation/D4RL: the return
of a random policy and that of a trained one. All datasets of a domain and all their versions share
one pair, except maze2d, where each maze has its own.
"""

import json
from functools import cache
from importlib import resources

from mail_agents.errors import unknown_name

_LOCOMOTION = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
_ADROIT = ("human", "cloned", "expert")
_MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
#: Dataset types and versions by domain. Names are matched in full, because "hopper-v5" is a
#: Gymnasium environment with other rewards and must not borrow the scores of "hopper-medium-v2".
_DATASETS = {
    **dict.fromkeys(("hopper", "halfcheetah", "walker2d", "ant"), (_LOCOMOTION, "012")),
    **dict.fromkeys(("pen", "hammer", "door", "relocate"), (_ADROIT, "01")),
    "antmaze": (_MAZES, "02"),
    "kitchen": (("complete", "partial", "mixed"), "0"),
}


@cache
def _table() -> dict[str, dict[str, float]]:
    text = (
        resources.files("mail_wrappers.datasets").joinpath("d4rl_reference.json").read_text("utf-8")
    )
    return json.loads(text)


def domains() -> tuple[str, ...]:
    """The domains with a pair of reference returns, such as ``hopper`` and ``maze2d-umaze``."""
    return tuple(_table())


def domain_of(name: str) -> str:
    """The domain of a D4RL dataset.

    Args:
        name: Dataset id such as ``hopper-medium-v2``, with or without the version, or a domain.

    Raises:
        UnknownNameError: D4RL has no such dataset.
    """
    if name in _table():
        return name
    head, _, tail = name.rpartition("-v")
    stem, version = (head, tail) if tail.isdigit() else (name, None)
    if stem in _table() and stem.startswith("maze2d") and version == "1":
        return stem
    domain, _, kind = stem.partition("-")
    kinds, versions = _DATASETS.get(domain, ((), ""))
    if kind in kinds and (version is None or version in list(versions)):
        return domain
    datasets = [f"{d}-{k}-v{v[-1]}" for d, (ks, v) in _DATASETS.items() for k in ks]
    mazes = [f"{d}-v1" for d in _table() if d.startswith("maze2d")]
    raise unknown_name(
        "D4RL dataset",
        name,
        [*_table(), *datasets, *mazes],
        "Environments of other versions (such as Gymnasium's Hopper-v5) have other returns and no "
        "D4RL reference; set reference_scores of the dataset to your own measurement instead.",
    )


def reference(name: str) -> dict[str, float | str]:
    """Reference returns of a D4RL dataset, as stored in ``dataset.info.reference_scores[task]``.

    Args:
        name: Dataset id such as ``hopper-medium-v2``, with or without the version, or a domain
            such as ``hopper``.

    Returns:
        ``{"min": float, "max": float, "source": "d4rl:<domain>"}``; undiscounted returns.

    Raises:
        UnknownNameError: D4RL has no such dataset.
    """
    domain = domain_of(name)
    pair = _table()[domain]
    return {"min": pair["min"], "max": pair["max"], "source": f"d4rl:{domain}"}
