"""Agents to compare with. They register through the entry point that third parties use."""

from collections.abc import Mapping
from typing import Any

from mail_agents import register

_REFERENCES = {
    "random": "Uniform random actions",
    "mean-action": "The mean action of the demonstrations",
}

#: Padding in front of a window, and weight decay of everything, as kzl's and Ota's codes have it.
_RELEASED = {"padding": "left_legacy", "optim": {"decayed": "all"}}
_DM = {
    "embedding": "mlp",
    "time_embedding": "post_norm",
    "state_weight": 0.05,
    "return_weight": 0.05,
    "self_evolution": {"enabled": True},
    "optim": {"warmup_steps": 2500},
}
#: ``run.sh`` of github.com/aopolin-lv/DecisionMamba.
_DM_OPTIM = {"warmup_steps": 2500, "weight_decay": 1e-5, "eps": 1e-6}
_OTA_OPTIM = {"lr": 1e-3}

#: Config class, paper and presets (config overrides and further tags) of each sequence model. A tag
#: ``d4rl-<source>`` says whose settings ``mail_baselines.d4rl_settings`` takes on D4RL's data.
_SEQUENCE: dict[str, tuple[str, dict[str, tuple[Mapping[str, Any], tuple[str, ...]]]]] = {
    "DTConfig": (
        "arXiv:2106.01345",
        {
            "dt": ({}, ("d4rl-kzl",)),
            # gym/experiment.py of github.com/kzl/decision-transformer.
            "dt-released": (_RELEASED, ("released", "d4rl-kzl")),
            # algorithms/offline/dt.py of github.com/corl-team/CORL.
            "dt-corl": (
                {
                    "activation": "gelu",
                    "init": "normal",
                    "loss_average": "all",
                    "max_timestep": 1020,
                    "optim": {"decayed": "all"},
                },
                ("d4rl-corl",),
            ),
        },
    ),
    "DecisionMambaConfig": (
        "arXiv:2403.19925",
        {
            "decision-mamba": ({"optim": _OTA_OPTIM}, ("d4rl-ota",)),
            "decision-mamba-released": (
                _RELEASED | {"released_init": True, "optim": _OTA_OPTIM | {"decayed": "all"}},
                ("released", "d4rl-ota"),
            ),
        },
    ),
    "MultiGrainedConfig": (
        "arXiv:2406.05427",
        {
            "dm": (_DM, ("d4rl-dm",)),
            "dm-figure": (_DM | {"variant": "figure"}, ("d4rl-dm",)),
            "dm-paper": (_DM | {"d_model": 768, "layers": 24, "optim": _DM_OPTIM}, ("d4rl-dm",)),
            "dm-released": (
                _DM
                | {
                    "variant": "released",
                    "padding": "left_legacy",
                    "squash": False,
                    # Switched off in the released code by a constant.
                    "self_evolution": {"enabled": False},
                    "optim": _DM_OPTIM | {"decayed": "all_but_biases_and_layernorms"},
                },
                ("released", "d4rl-dm"),
            ),
        },
    ),
}

_BC: dict[str, tuple[str, dict[str, Any]]] = {
    "bc": ("", {}),
    "bc-10": ("arXiv:2106.01345", {"top_fraction": 0.1}),
    "bc-kzl": (
        "arXiv:2106.01345",
        {
            "history": 20,
            "padding": "left_legacy",
            "width": 128,
            "layers": 3,
            "dropout": 0.1,
            "optim": {
                "name": "adamw",
                "lr": 1e-4,
                "weight_decay": 1e-4,
                "decayed": "all",
                "warmup_steps": 10_000,
                "batch_size": 64,
            },
        },
    ),
}


#: Non-linearity and units of Stable-Baselines3's actors.
_SB3 = {
    "sac": {"activation": "relu", "action_norm": "bounds"},
    "ppo": {"activation": "tanh", "action_norm": "identity"},
    "td3": {"activation": "relu", "action_norm": "bounds"},
}


def register_agents() -> None:
    """Registers every baseline: strings only, nothing heavy is imported."""
    for name in _REFERENCES:
        class_name = "".join(part.capitalize() for part in name.split("-")) + "Agent"
        register(
            name,
            entry_point=f"mail_baselines.reference:{class_name}",
            config_entry_point="mail_baselines.reference:ReferenceConfig",
            tags=("baseline", "reference"),
        )
    for config, (paper, presets) in _SEQUENCE.items():
        for name, (kwargs, tags) in presets.items():
            register(
                name,
                entry_point="mail_baselines.sequence_agent:SequenceAgent",
                config_entry_point=f"mail_baselines.config:{config}",
                tags=("baseline", "offline-rl", "sequence", *tags),
                paper=paper,
                kwargs=kwargs,
            )
    for name, (paper, kwargs) in _BC.items():
        register(
            name,
            entry_point="mail_baselines.bc:BCAgent",
            config_entry_point="mail_baselines.config:BCConfig",
            tags=("baseline", "offline-rl", "imitation"),
            paper=paper,
            kwargs=kwargs,
        )
    for algorithm, kwargs in _SB3.items():
        register(
            f"sb3/{algorithm}",
            entry_point="mail_baselines.sb3:SB3Agent",
            config_entry_point="mail_baselines.sb3:SB3Config",
            tags=("baseline", "expert"),
            kwargs={"algorithm": algorithm, **kwargs},
        )
