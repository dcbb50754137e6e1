"""Compiled training: one graph without breaks, with the losses and gradients of eager code.

``aot_eager`` traces and differentiates as the default backend does, without generating code: it
needs no C++ compiler and takes seconds.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from mail_agents.agents.mail import MailPolicy
from mail_agents.agents.mail_config import MailConfig
from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature, FeatureSpec
from mail_agents.ops import _native
from mail_agents.ops.backends import recording_backends, use_backend

ACTION = Feature("state", (2,), "float32", low=(-1.0, -1.0), high=(1.0, 1.0))
STATE = Feature("state", (3,), "float32")
CAMERA = Feature("image", (36, 36, 3), "uint8")


def policy(mixer, layers, objective, *, camera=False):
    torch._dynamo.reset()
    torch.manual_seed(0)
    stack = {"mixer": mixer, "d_state": 4, "heads": 2, "dropout": 0.0}
    config = {
        **{"width": 16, "feature_width": 8, "history": 2, "horizon": 2, "objective": objective},
        "encoder": stack | {"layers": layers},
        "decoder": stack | {"layers": 1},
        "image": {"crop": 33, "jitter": 0.2} if camera else {},
    }
    observations = {"state": STATE} | ({"view": CAMERA} if camera else {})
    return MailPolicy(MailConfig().replace(config), FeatureSpec(observations, ACTION)).train()


def update(p):
    """Loss and gradients of a fixed batch with fixed draws."""
    g = torch.Generator().manual_seed(1)
    batch = {
        "obs/state": torch.randn(3, 2, 3, generator=g),
        "obs/view": torch.randint(0, 256, (3, 2, 36, 36, 3), generator=g, dtype=torch.uint8),
        "mask": torch.tensor([[False, True], [True, True], [True, True]]),
        "action": torch.rand(3, 2, 2, generator=g),
        "action_mask": torch.tensor([[True, False], [True, True], [True, True]]),
    }
    p.zero_grad()
    loss, _ = p(batch, torch.Generator().manual_seed(7))
    loss.backward()
    gradients = {n: w.grad.clone() for n, w in p.named_parameters() if w.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize(
    ("mixer", "layers", "objective", "camera"),
    [
        ("mamba", 0, "ddpm", False),
        ("mamba", 1, "bc", False),
        ("mamba", 0, "ddpm", True),
        ("attention", 0, "bc", False),
        ("attention", 1, "ddpm", False),
    ],
)
def test_the_compiled_loss_is_one_graph_and_equals_eager(mixer, layers, objective, camera):
    p = policy(mixer, layers, objective, camera=camera)
    expected = update(p)
    counters.clear()
    p.compile(backend="aot_eager")
    ran = {}
    with recording_backends(ran):
        found = update(p)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    fast = {"torch" if _native.load().failure else "native"}
    assert ran == ({"selective_scan": fast, "causal_conv1d": fast} if mixer == "mamba" else {})


def test_a_backend_that_cannot_be_compiled_is_refused():
    p = policy("mamba", 0, "bc")
    p.compile(backend="aot_eager")
    with use_backend("reference"), pytest.raises(InvalidInputError, match="leave out --compile"):
        update(p)
