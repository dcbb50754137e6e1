"""A tiny world (reach a point on a plane), its demonstrations, and an agent."""

import gymnasium

gymnasium.register("toybox/Point-v0", entry_point="toybox.world:PointEnv", max_episode_steps=12)


def register_agents():
    import mail_agents

    mail_agents.register(
        "toybox/mlp-v1",
        entry_point="toybox.agent:MlpAgent",
        config_entry_point="toybox.agent:MlpConfig",
        tags=("imitation", "toy"),
    )
