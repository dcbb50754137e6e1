"""How published sequence models were set up on D4RL: context, scale of returns, target returns.

Sources: ``gym/experiment.py`` of github.com/kzl/decision-transformer ("kzl"),
``configs/offline/dt`` of github.com/corl-team/CORL ("corl"), ``experiment-d4rl/experiment.py`` of
github.com/aopolin-lv/DecisionMamba ("dm") and ``gym/util/trainer.py`` and ``run_experiments.sh`` of
github.com/Toshihiro-Ota/decision-mamba ("ota"). Targets are raw returns, in the order of the
source. Published scores differ in which target they quote, so name it beside a score.

One value is ours: Adroit returns are divided by 1000, where CORL feeds returns of 10,000 unscaled.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mail_agents.data.dataset import DatasetInfo
from mail_agents.errors import UnknownNameError, unknown_name
from mail_agents.registry import spec
from mail_baselines.config import SequenceConfig

C = TypeVar("C", bound=SequenceConfig)

Targets = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class D4RLSetting:
    """Settings of one dataset.

    Attributes:
        targets: Target returns by source.
        return_scale: Returns are divided by this.
        history: Steps of context.
        max_timestep: Longest episode.
        decision_mamba: Config overrides of the published plain Decision Mamba for this dataset.
    """

    targets: Targets = field(default_factory=dict)
    return_scale: float = 1000.0
    history: int = 20
    max_timestep: int = 1000
    decision_mamba: Mapping[str, Any] = field(default_factory=dict)

    def overrides(self, source: str) -> dict[str, Any]:
        """Config overrides that set a sequence agent up for this dataset as a source does."""
        # CORL's table of times reaches one window past the episode.
        past_end = self.history if source == "corl" else 0
        out: dict[str, Any] = {
            "history": self.history,
            "return_scale": self.return_scale,
            "max_timestep": self.max_timestep + past_end,
        }
        return out | (dict(self.decision_mamba) if source == "ota" else {})


_CHEETAH_MIXED = (12000.0, 8000.0, 6000.0, 4500.0)
_PLAY = {"corl": (1.0, 0.5)}
_DIVERSE = {"corl": (1.0, 0.5, 0.25, 0.125, 0.06, 0.03)}

#: By domain; :data:`_DATASETS` replaces the targets of single datasets.
_DOMAINS: dict[str, D4RLSetting] = {
    "hopper": D4RLSetting(
        {
            "kzl": (3600.0, 1800.0),
            "corl": (3600.0, 1800.0),
            "dm": (3600.0,),
            "ota": (1800.0, 3600.0, 7200.0, 36000.0, 72000.0),
        }
    ),
    "halfcheetah": D4RLSetting(
        {
            "kzl": (12000.0, 6000.0),
            "corl": (12000.0, 6000.0),
            "dm": _CHEETAH_MIXED,
            "ota": (6000.0, 12000.0, 24000.0, 120000.0, 240000.0),
        }
    ),
    "walker2d": D4RLSetting(
        {
            "kzl": (5000.0, 2500.0),
            "corl": (5000.0, 2500.0),
            "dm": (5000.0,),
            "ota": (2500.0, 5000.0, 10000.0, 50000.0, 100000.0),
        }
    ),
    "reacher2d": D4RLSetting(
        {"kzl": (76.0, 40.0), "dm": (76.0, 40.0)}, return_scale=10.0, history=5, max_timestep=100
    ),
    "ant": D4RLSetting({"dm": (3600.0, 6000.0)}),
    "antmaze": D4RLSetting(return_scale=1.0),
    "kitchen": D4RLSetting({"dm": (5.0, 4.0, 3.0, 2.0, 1.0)}, return_scale=1.0),
    "pen": D4RLSetting({"corl": (3100.0, 1550.0)}),
    "door": D4RLSetting({"corl": (2900.0, 1450.0)}),
    "hammer": D4RLSetting({"corl": (12800.0, 6400.0)}),
    "relocate": D4RLSetting({"corl": (4300.0, 2150.0)}),
    "maze2d": D4RLSetting({"corl": (280.0, 140.0)}, return_scale=1.0),
}

#: Targets of single datasets, over those of the domain.
_DATASETS: dict[tuple[str, str], Targets] = {
    ("halfcheetah", "medium-expert"): {"dm": (12000.0,)},
    ("antmaze", "umaze"): {**_PLAY, "dm": (5.0,)},
    ("antmaze", "umaze-diverse"): {**_DIVERSE, "dm": (20.0,)},
    ("antmaze", "medium-play"): _PLAY,
    ("antmaze", "large-play"): _PLAY,
    ("antmaze", "medium-diverse"): _DIVERSE,
    ("antmaze", "large-diverse"): _DIVERSE,
}

#: Width and learning rate of the plain Decision Mamba; others keep the preset's.
_WIDE = {"d_model": 256, "optim.lr": 1e-4}
_FAST = {"d_model": 128, "optim.lr": 1e-3}
_DECISION_MAMBA: dict[tuple[str, str], dict[str, Any]] = {
    ("hopper", "medium"): _WIDE,
    ("hopper", "medium-replay"): _WIDE,
    ("hopper", "medium-expert"): _FAST,
    **{("halfcheetah", kind): _FAST for kind in ("medium", "medium-replay", "medium-expert")},
    ("walker2d", "medium"): {"d_model": 128, "optim.lr": 1e-4},
    ("walker2d", "medium-replay"): _FAST,
    ("walker2d", "medium-expert"): _FAST,
}


def d4rl_setting(name: str) -> D4RLSetting:
    """Looks the settings of a dataset or environment up.

    Args:
        name: For example ``"hopper-medium-v2"``, ``"hopper"``, ``"Hopper-v4"`` or
            ``"D4RL/pen/human-v2"``.

    Raises:
        UnknownNameError: No source has settings for this domain.
    """
    words = [word for word in re.split(r"[/_:-]", name.lower()) if word != "d4rl"]
    domain = next((word for word in words if word in _DOMAINS), None)
    if domain is None:
        hint = f"(Looked for in {name!r}; without settings, set the fields of the config instead.)"
        raise unknown_name("D4RL domain", (words or [name])[0], _DOMAINS, hint)
    kind = "-".join(w for w in words[words.index(domain) + 1 :] if not re.fullmatch(r"v\d+", w))
    found = _DOMAINS[domain]
    return D4RLSetting(
        targets={**found.targets, **_DATASETS.get((domain, kind), {})},
        return_scale=found.return_scale,
        history=found.history,
        max_timestep=found.max_timestep,
        decision_mamba=_DECISION_MAMBA.get((domain, kind), {}),
    )


def setting_of(info: DatasetInfo) -> D4RLSetting | None:
    """Settings of a dataset that D4RL published, in its own files or in Minari's; else None.

    Other data of the same tasks (recorded here, say) has other returns, so published targets would
    ask for what it does not hold.
    """
    kind, name = info.source.get("kind"), str(info.source.get("id", ""))
    # Other data that went through a file of D4RL's layout has a name without D4RL's version.
    file = kind == "d4rl-hdf5" and re.search(r"-v\d+$", name)
    if not (file or (kind == "minari" and name.startswith("D4RL/"))):
        return None
    try:
        return d4rl_setting(name)
    except UnknownNameError:
        return None


def source_of(agent_id: str) -> str | None:
    """Whose settings a preset follows: the one in its tag ``d4rl-<source>``; None without a tag.

    Raises:
        UnknownNameError: No agent has this id.
    """
    tags = {f"d4rl-{source}": source for source in ("kzl", "corl", "dm", "ota")}
    return next((tags[tag] for tag in spec(agent_id).tags if tag in tags), None)


def adapt(
    config: C, agent_id: str, info: DatasetInfo, say: Callable[[str], None] | None = None
) -> C:
    """Sets a published agent up for a dataset that D4RL published; fields that were changed stay.

    Args:
        config: A preset's config, possibly changed by the user.
        agent_id: The preset.
        info: Of the dataset.
        say: Receives a line that names the fields that are set.

    Returns:
        The config with the published context, scale and table of times, and, for the plain
        Decision Mamba, width and learning rate; unchanged where :func:`source_of` knows none.
    """
    setting, source = setting_of(info), source_of(agent_id)
    if setting is None or source is None:
        return config
    preset, chosen = _flat(spec(agent_id).config().to_dict()), _flat(config.to_dict())
    kept = {k: v for k, v in setting.overrides(source).items() if chosen[k] == preset[k]}
    changes = {k: v for k, v in kept.items() if v != chosen[k]}
    if changes and say is not None:
        fields = ", ".join(f"{name} {value}" for name, value in changes.items())
        say(f"published settings of {info.source['id']}: {fields}")
    return config.replace(changes)


def published_targets(agent_id: str, info: DatasetInfo) -> tuple[float, ...]:
    """The target returns under which a published agent was scored on a dataset; () if none."""
    setting, source = setting_of(info), source_of(agent_id)
    if setting is None or source is None:
        return ()
    return setting.targets.get(source, ())


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, Mapping)
        out |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return out
