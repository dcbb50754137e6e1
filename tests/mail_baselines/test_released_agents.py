"""Loss, gradient and episodes of the released codes, from their own batches and loops, pinned.

The numbers were computed in float32 on a CPU with kzl/decision-transformer ``e2d82e6``,
corl-team/CORL ``eeeeef2``, Toshihiro-Ota/decision-mamba ``35f9944`` (with the pure torch
``MambaBlock`` of that repository) and aopolin-lv/DecisionMamba ``d37dc82`` (its fixed width
replaced): model, sampling of windows, loss and evaluation loop of each. Weights, trajectories and
observations come from the formula ``wave`` below; weights were put into the released models by
name. Renaming a parameter changes the order in which ``fill`` visits them, and with it every number
here.
"""

import math

import numpy as np
import pytest
import torch

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.data.episode import Episode
from mail_agents.features import Feature, FeatureSpec

STATES, ACTIONS, HISTORY, LONGEST, SCALE = 3, 2, 4, 12, 10.0
LENGTHS = (9, 2, 6)
# Rows of the dataset at which windows start: full ones, and one of each shorter length.
STARTS = (0, 7, 10, 14)
FEATURES = FeatureSpec(
    {"state": Feature("state", (STATES,), "float32")},
    Feature("state", (ACTIONS,), "float32", low=(-1.0,) * ACTIONS, high=(1.0,) * ACTIONS),
)

# Loss, six entries of the gradient of the state embedding, and the two actions of six steps.
RELEASED = {
    "dt-released": """0.578336
        0.035252 -0.003345  0.004097  0.023405 -0.007385 -0.033194
        -0.565361 0.043085  -0.472040 0.344874  -0.621740 0.405494
        -0.593642 0.585354  -0.583657 0.166701  -0.426698 0.345057""",
    "dt-corl": """0.350313
        0.026293 -0.001592 -0.000021  0.013624  0.000380 -0.018579
        -0.553267 0.017623  -0.374212 0.244549  -0.621918 0.399378
        -0.578449 0.573326  -0.573914 0.130582  -0.389338 0.309148""",
    "decision-mamba-released": """0.331431
        0.032656  0.037369  0.015626 -0.043297 -0.006238 -0.011288
        0.405117 -0.545814   0.394709 0.080812  -0.392181 0.210923
        0.079340 0.438944    0.085793 -0.333129  0.028908 0.267087""",
    "dm-released": """0.455025
        0.015674 -0.041055 -0.040041 -0.019674  0.034708  0.015281
        0.107601 0.093208    0.083652 0.054262   0.053752 -0.116755
        0.106654 -0.145621   0.068804 0.060936   0.120342 -0.060603""",
}


def wave(shape, phase):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(index**1.5 + phase).reshape(shape)


def fill(net):
    """Parameter i, in alphabetical order, becomes ``scale * wave(shape, i)``.

    One is added to scales of norms and to the skip D of Mamba.
    """
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(net.named_parameters())):
            offset = float(p.ndim == 1 and name.endswith(("weight", ".D")))
            scale = 0.3 if p.ndim == 1 else p.shape[1] ** -0.5
            scale *= 0.5 if name.startswith("action_head") else 1.0
            p.copy_(scale * wave(p.shape, i) + offset)


def waves() -> MemoryDataset:
    episodes = []
    for number, length in enumerate(LENGTHS):
        last = np.arange(length) == length - 1
        episodes.append(
            Episode(
                {"state": wave((length + 1, STATES), number).float().numpy()},
                (0.9 * wave((length, ACTIONS), number + 0.5)).float().numpy(),
                (1 + wave((length,), number)).numpy(),
                terminations=last,
                truncations=np.zeros(length, bool),
            )
        )
    return MemoryDataset(episodes, features=FEATURES)


def play(agent, target: float) -> list[float]:
    """Six steps of an environment that shows a wave and pays 1.0, 1.1, ..."""
    actions = []
    agent.reset(target_return=target)
    for t, state in enumerate(wave((8, STATES), 2.0).float().numpy()[:6]):
        actions += agent.act(state[None])[0].tolist()
        agent.step(1 + 0.1 * t, False, False)
    return actions


@pytest.mark.parametrize("agent_id", RELEASED)
def test_agents_learn_and_act_as_the_released_ones(agent_id):
    overrides = {"heads": 2} if agent_id.startswith("dt") else {}
    rows = LONGEST + HISTORY if agent_id == "dt-corl" else LONGEST
    agent = mail_agents.make(
        agent_id,
        FEATURES,
        device="cpu",
        d_model=8,
        layers=2,
        history=HISTORY,
        max_timestep=rows,
        return_scale=SCALE,
        **overrides,
    )
    dataset = waves()
    agent.fit_statistics(dataset)
    fill(agent.policy)
    agent.policy.eval()
    loss, _ = agent.loss(dataset.windows(agent.window_spec)[np.array(STARTS)])
    embedding = agent.policy.embed_state
    weight = embedding.inner.weight if agent_id == "dm-released" else embedding.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    got = [loss.item(), *gradient[:2].flatten().tolist(), *play(agent, target=12.0)]
    # Upstream divides states by std + 1e-6.
    assert got == pytest.approx([float(v) for v in RELEASED[agent_id].split()], abs=5e-6)
