"""Registers the built-in agents: strings and numbers only, nothing heavy is imported."""

from typing import Any

from mail_agents.registry import register

_MAMBA = {"mixer": "mamba", "dropout": 0.0}
_ATTENTION = {"mixer": "attention", "heads": 4, "dropout": 0.1}
_NONE = {"layers": 0}

#: Encoder and decoder of the published variants (arXiv:2406.08234; scripts of ALRhub/MaIL).
_MAIL: dict[str, dict[str, dict[str, Any]]] = {
    "d-ma": {
        "encoder": _MAMBA | _NONE,
        "decoder": _MAMBA | {"layers": 16, "d_state": 16, "d_conv": 4},
    },
    "ed-ma": {
        "encoder": _MAMBA | {"layers": 8, "d_state": 8, "d_conv": 2},
        "decoder": _MAMBA | {"layers": 10, "d_state": 8, "d_conv": 2},
    },
    "d-tr": {"encoder": _ATTENTION | _NONE, "decoder": _ATTENTION | {"layers": 8}},
    "ed-tr": {"encoder": _ATTENTION | {"layers": 4}, "decoder": _ATTENTION | {"layers": 6}},
}
#: The larger-state variant that the scripts use for LIBERO-Spatial, -Object and -Long.
_ED_MA_SO = {
    "encoder": _MAMBA | {"layers": 10, "d_state": 16, "d_conv": 4},
    "decoder": _MAMBA | {"layers": 6, "d_state": 16, "d_conv": 2},
}
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "bc": {"objective": "bc", "ema_decay": None},
    "ddpm": {"objective": "ddpm", "ema_decay": 0.995},
}
_RELEASED = {"init": "upstream", "padding": "none"}


def _register_mail(name: str, kwargs: dict[str, Any], *tags: str) -> None:
    register(
        f"mail/{name}",
        entry_point="mail_agents.agents.mail:MailAgent",
        config_entry_point="mail_agents.agents.mail_config:MailConfig",
        tags=("imitation", "mail", *tags),
        paper="arXiv:2406.08234",
        kwargs=kwargs,
    )


def register_agents() -> None:
    """Registers every built-in agent."""
    for variant, stacks in _MAIL.items():
        mixer = "transformer" if variant.endswith("tr") else "mamba"
        for objective, settings in _OBJECTIVES.items():
            kwargs = stacks | settings
            tags = (mixer, objective)
            _register_mail(f"{variant}-{objective}", kwargs, *tags)
            _register_mail(f"{variant}-{objective}-released", kwargs | _RELEASED, *tags, "released")
    _register_mail("ed-ma-ddpm-so", _ED_MA_SO | _OBJECTIVES["ddpm"], "mamba", "ddpm")
