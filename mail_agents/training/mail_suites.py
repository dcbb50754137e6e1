"""MaIL's settings for each LIBERO suite (arXiv:2406.08234), as its released scripts have them.

From ``script/`` and ``config/`` of github.com/ALRhub/MaIL: sizes of the sequence models, history
and chunk, batch, and which suites are told their task by language. Where scripts of one suite
differ between experiments, those of the main comparison count; depths of the Transformers are the
same everywhere. The paper trains with a history of 1 and of 5 steps, and publishes results for no
other; 5 is the default here.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from mail_agents.errors import InvalidInputError, unknown_name

Suite = Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
SUITES: tuple[str, ...] = get_args(Suite)

#: The frozen text model whose embedding is the language token.
TEXT_MODEL = "openai/clip-vit-base-patch32"

_VARIANT = re.compile(r"mail/((?:d|ed)-(?:ma|tr))-(bc|ddpm)(?:-released)?")
#: Layers, state size and convolution of encoder and decoder.
_ED_MA = {"encoder": (8, 8, 2), "decoder": (10, 8, 2)}
_ED_MA_WIDE_STATE = {"encoder": (10, 16, 4), "decoder": (6, 16, 2)}
_ED_MA_GOAL = {"encoder": (10, 16, 4), "decoder": (10, 16, 2)}
_D_MA = {"decoder": (16, 16, 4)}
_D_MA_GOAL = {"decoder": (16, 8, 4)}
_TRANSFORMERS = {"d-tr": {"decoder": 8}, "ed-tr": {"encoder": 4, "decoder": 6}}


def suite_settings(agent: str, suite: str) -> dict[str, Any]:
    """Overrides of an agent's config that make it the published one for a suite.

    Args:
        agent: ``mail/{d-ma,ed-ma,d-tr,ed-tr}-{bc,ddpm}``, with or without ``-released``.
        suite: One of :data:`SUITES`.

    Raises:
        InvalidInputError: The agent is none of the published variants.
        UnknownNameError: There is no such suite.
    """
    if suite not in SUITES:
        raise unknown_name("LIBERO suite", suite, SUITES)
    match = _VARIANT.fullmatch(agent)
    if match is None:
        raise InvalidInputError(
            f"--suite {suite} chooses the sizes of MaIL's published variants, and {agent!r} is "
            "none of them. Use mail/{d-ma,ed-ma,d-tr,ed-tr}-{bc,ddpm}, with or without -released, "
            "or drop --suite and set the sizes yourself."
        )
    return {
        "history": 5,
        "horizon": 10 if suite == "libero_10" else 5,
        "language": TEXT_MODEL if suite in ("libero_goal", "libero_90") else "none",
        "optim": {"batch_size": 128 if suite == "libero_90" else 256},
        **_stacks(match[1], match[2], suite),
    }


def _stacks(variant: str, objective: str, suite: str) -> Mapping[str, Any]:
    if variant in _TRANSFORMERS:
        return {name: {"layers": n} for name, n in _TRANSFORMERS[variant].items()}
    sizes = _D_MA if variant == "d-ma" else _ED_MA
    if objective == "ddpm" and suite == "libero_goal":
        sizes = _D_MA_GOAL if variant == "d-ma" else _ED_MA_GOAL
    elif objective == "ddpm" and variant == "ed-ma" and suite != "libero_90":
        sizes = _ED_MA_WIDE_STATE
    keys = ("layers", "d_state", "d_conv")
    return {name: dict(zip(keys, values, strict=True)) for name, values in sizes.items()}
