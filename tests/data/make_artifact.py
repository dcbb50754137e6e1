"""Writes the golden artifact of the current format version; run once per version, never again.

    python tests/data/make_artifact.py tests/data/artifact-v1

The folder gets ``agent.safetensors`` and ``actions.json`` (observations, and the actions that the
agent gave for them then). Every later version must load it and act the same.
"""

import json
import sys
from pathlib import Path

import numpy as np

import mail_agents
from mail_agents.data.example import example_dataset
from mail_agents.features import Feature, FeatureSpec

FEATURES = FeatureSpec(
    {"a": Feature("state", (3,), "float64"), "b": Feature("scalar", (), "float32")},
    Feature("state", (2,), "float32", low=(-0.5, -1.0), high=(0.5, 1.0)),
)
SMALL = {"mixer": "mamba", "layers": 1, "d_state": 2, "d_conv": 2}


def main(folder: Path) -> None:
    """Trains for a few updates, so that weights, average and statistics all differ from a start."""
    folder.mkdir(parents=True)
    agent = mail_agents.make(
        "mail/ed-ma-ddpm",
        FEATURES,
        device="cpu",
        seed=5,
        history=3,
        horizon=2,
        width=8,
        feature_width=8,
        diffusion_steps=4,
        encoder=SMALL,
        decoder=SMALL,
        language="hash",
    )
    dataset = example_dataset(FEATURES, 12)
    agent.fit_statistics(dataset)
    agent.configure_optim()
    batch = dataset.windows(agent.window_spec)[np.arange(16)]
    for _ in range(5):
        agent.update(batch)
    agent.save(folder / "agent.safetensors")
    rng = np.random.default_rng(0)
    observations = {"a": rng.standard_normal((5, 2, 3)).tolist(), "b": rng.random((5, 2)).tolist()}
    actions = {}
    for deterministic in (True, False):
        agent.reset([0, 1], seed=[1, 2], task=["task-0", "task-1"])
        actions[str(deterministic)] = [
            agent.act(
                {"a": np.array(a), "b": np.array(b, np.float32)}, deterministic=deterministic
            ).tolist()
            for a, b in zip(observations["a"], observations["b"], strict=True)
        ]
    text = json.dumps({"observations": observations, "actions": actions}, indent=1)
    (folder / "actions.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
