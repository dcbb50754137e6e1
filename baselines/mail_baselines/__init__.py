"""Agents to compare with. They register through the entry point that third parties use."""

from mail_agents import register

_REFERENCES = {
    "random": "Uniform random actions",
    "mean-action": "The mean action of the demonstrations",
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
    for algorithm in ("sac", "ppo", "td3"):
        register(
            f"sb3/{algorithm}",
            entry_point="mail_baselines.sb3:SB3Agent",
            config_entry_point="mail_baselines.sb3:SB3Config",
            tags=("baseline", "expert"),
            kwargs={"algorithm": algorithm, "activation": "tanh" if algorithm == "ppo" else "relu"},
        )
