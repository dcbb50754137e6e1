"""Compiled training of sequence policies, and streams whose state is kept in place."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from mail_agents.cuda_graphs import Graphs
from mail_baselines.trunks import map_state

STREAMS = ["decision-mamba", "dm", "dm-figure"]


@pytest.mark.parametrize("agent_id", ["dt", "decision-mamba", "dm"])
def test_the_compiled_loss_is_one_graph_and_equals_eager(build, dataset, agent_id):
    torch._dynamo.reset()
    agent = build(agent_id, **({} if agent_id == "dm" else {"dropout": 0.0}))
    batch = dataset.windows(agent.window_spec)[np.arange(4)]

    def update():
        agent.policy.train()
        agent.policy.zero_grad()
        loss, metrics = agent.loss(batch)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in agent.policy.named_parameters()}
        return loss.detach(), metrics, grads

    expected = update()
    counters.clear()
    agent.policy.compile(backend="aot_eager")
    found = update()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    counters.clear()
    agent.policy.eval()
    agent.loss(batch)
    assert not counters  # only the training loss is compiled


class Tape:
    """Stands for a recorder of CUDA graphs: runs the function when a graph would be replayed."""

    def __init__(self):
        self.recordings = 0

    def __call__(self, function):
        self.recordings += 1
        output = function()
        return lambda: output.copy_(function()), output


def play(agent):
    """Three slots that fall out of step, restart, and act together and one by one."""
    rng, actions = np.random.default_rng(0), []

    def act(*slots):
        observation = rng.standard_normal((len(slots), 3)).astype(np.float32)
        actions.append(agent.act(observation, slots=slots))
        agent.step(np.ones(len(slots)), *np.zeros((2, len(slots)), bool), slots=slots)

    agent.reset([0, 1, 2], seed=0, target_return=5.0)
    for slots in ((0, 1, 2), (0, 1, 2), (0, 1), (2,), (1, 0), (2, 0)):
        act(*slots)
    agent.reset([1], target_return=4.0)
    for slots in ((0, 1, 2), (1,), (0, 1, 2)):
        act(*slots)
    with agent.planning_alike():  # rows are repeated
        act(1)
        act(0, 1, 2)
    act(0, 1, 2)
    return np.concatenate(actions)


@pytest.mark.parametrize("agent_id", STREAMS)
def test_recorded_streams_act_like_others(build, agent_id):
    expected = play(build(agent_id, acting="stream"))
    agent, tape = build(agent_id, acting="stream"), Tape()
    agent.policy._graphs = Graphs(tape)
    np.testing.assert_array_equal(play(agent), expected)
    recorded = tape.recordings
    assert recorded < 12
    np.testing.assert_array_equal(play(agent), expected)
    assert tape.recordings == recorded


@pytest.mark.parametrize("agent_id", STREAMS)
def test_streams_keep_their_state_where_it_is(build, agent_id):
    agent = build(agent_id, acting="stream")
    play(agent)
    places = []
    for _ in range(2):
        map_state(lambda part: places.append(part.data_ptr()) or part, agent._stream[1])
        play(agent)
    half = len(places) // 2
    assert places[:half] == places[half:]
    assert len(set(places[:half])) == half  # no two parts share memory


def test_recorded_windows_act_like_others(build):
    expected = play(build("dt"))
    agent, tape = build("dt"), Tape()
    agent.policy._graphs = Graphs(tape)
    np.testing.assert_array_equal(play(agent), expected)
    assert tape.recordings


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("agent_id", [*STREAMS, "dt"])
def test_cuda_graphs_act_like_eager_code(build, agent_id, tmp_path):
    import mail_agents

    file = build(agent_id, **({} if agent_id == "dt" else {"acting": "stream"})).save(
        tmp_path / "agent.safetensors"
    )
    plain, recorded = (mail_agents.load(file, device="cuda") for _ in range(2))
    recorded.policy.compile()
    expected = play(plain)
    for _ in range(2):
        np.testing.assert_allclose(play(recorded), expected, atol=1e-4)
    assert len(recorded.policy._graphs)
