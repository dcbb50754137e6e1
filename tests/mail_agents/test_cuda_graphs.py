"""The logic around CUDA graphs, with a recorder that needs no GPU; and the graphs where one is."""

import copy
import logging
import pickle
import threading

import pytest
import torch
from torch import nn

from mail_agents import cuda_graphs
from mail_agents.cuda_graphs import Graphs
from mail_agents.errors import InvalidInputError
from mail_agents.ops.backends import use_backend


class Tape:
    """Stands for a recorder: like a graph, its replay reads and writes fixed tensors."""

    def __init__(self):
        self.recordings, self.replays = 0, 0

    def __call__(self, function):
        self.recordings += 1
        output = function()

        def replay():
            self.replays += 1
            output.copy_(function())

        return replay, output


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))


def affine(module, inputs):
    return module.inner(inputs["x"] + inputs.get("y", 0.0) + module.shift)


def accumulate(module, inputs, state):
    (total,), _ = state
    total += inputs["x"].sum(0)
    return affine(module, inputs) + total


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Affine()


@pytest.fixture
def tape():
    return Tape()


@pytest.fixture
def graphs(tape):
    return Graphs(tape)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def x(rows=2, seed=0, **kwargs):
    return {"x": torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), **kwargs)}


def test_one_recording_per_kind_of_input(net, tape, graphs):
    for rows, recordings in ((2, 1), (2, 1), (4, 2), (2, 2)):
        for seed in range(3):
            inputs = x(rows, seed)
            assert torch.equal(graphs(affine, net, inputs), affine(net, inputs))
        assert tape.recordings == recordings
    assert tape.replays == 12
    two = x() | {"y": torch.ones(2, 3)}
    for inputs in (two, dict(reversed(two.items()))):
        assert torch.equal(graphs(affine, net, inputs), affine(net, inputs))
        assert tape.recordings == 3


def test_results_and_inputs_belong_to_the_caller(net, graphs):
    inputs = x()
    before = inputs["x"].clone()
    first = graphs(affine, net, inputs)
    kept = first.clone()
    graphs(affine, net, x(seed=1))
    assert torch.equal(first, kept)
    assert torch.equal(inputs["x"], before)


def replaced(net):
    net.inner.weight = nn.Parameter(net.inner.weight + 1)


def assigned(net):
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, assign=True)


def exchanged(net):
    net.inner = nn.Linear(3, 3)


def moved(net):
    net.inner.weight.data = net.inner.weight.data + 1


def shifted(net):
    net.shift = net.shift + 1


def test_weights_updated_in_place_are_seen(net, tape, graphs):
    before = graphs(affine, net, x())
    with torch.no_grad():
        for tensor in (*net.parameters(), net.shift):
            tensor.mul_(1.5)
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
    after = graphs(affine, net, x())
    assert torch.equal(after, affine(net, x()))
    assert not torch.equal(after, before)
    assert tape.recordings == 1


@pytest.mark.parametrize("change", [replaced, assigned, exchanged, moved, shifted])
def test_weights_in_another_place_are_recorded_again(net, tape, graphs, change):
    graphs(affine, net, x())
    change(net)
    assert torch.equal(graphs(affine, net, x()), affine(net, x()))
    assert tape.recordings == 2
    assert len(graphs) == 1  # the old one is gone


def test_another_kernel_backend_is_another_recording(net, tape, graphs):
    graphs(affine, net, x())
    with use_backend("reference"):
        graphs(affine, net, x())
    assert tape.recordings == 2
    graphs(affine, net, x())
    assert tape.recordings == 2


def test_state_is_updated_in_place_and_untouched_by_recording(net, tape, graphs):
    def state():
        return (torch.zeros(3),), torch.zeros(1)

    ours, theirs = state(), state()
    for seed in range(4):
        found = graphs(accumulate, net, x(seed=seed), ours)
        assert torch.equal(found, accumulate(net, x(seed=seed), theirs))
        assert torch.equal(ours[0][0], theirs[0][0])
    assert tape.recordings == 1
    graphs(accumulate, net, x(), state())
    assert tape.recordings == 2  # a state in another place


def total(module, inputs, state):
    return state[0].sum().view(1) * state[1]


def test_states_at_one_place_that_lie_there_differently_are_recorded_again(net, tape, graphs):
    memory = torch.arange(6.0)
    states = [memory, memory[:3], memory.view(2, 3).t(), memory.view(torch.int32)]
    for recordings, state in enumerate(states, start=1):
        for _ in range(2):
            found = graphs(total, net, x(), (state, 1))
            assert torch.equal(found, total(net, x(), (state, 1)))
        assert tape.recordings == recordings


def test_numbers_in_a_state_are_not_recorded_for_others(net, graphs):
    state = torch.arange(6.0)
    for factor in (1, 2, 1):
        assert float(graphs(total, net, x(), (state, factor))) == 15 * factor


def test_the_oldest_recording_gives_way(net, tape, graphs, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    for rows, recordings in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        graphs(affine, net, x(rows))
        assert (tape.recordings, len(graphs)) == (recordings, min(recordings, 2))


def test_many_kinds_of_input_are_not_recorded_for_ever(net, tape, graphs, monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    with caplog.at_level(logging.WARNING, "mail_agents.cuda_graphs"):
        for _ in range(3):
            for rows in range(1, 6):
                assert torch.equal(graphs(affine, net, x(rows)), affine(net, x(rows)))
    assert tape.recordings == 4
    assert len(graphs) == 2
    assert tape.replays == 4 + 2 * 2  # the last two kinds stay recorded
    (message,) = caplog.messages
    assert "more than 3 kinds of input" in message


def test_copies_have_no_recordings(net, tape, graphs):
    graphs(affine, net, x())
    for other in (copy.copy(graphs), copy.deepcopy(graphs), pickle.loads(pickle.dumps(Graphs()))):
        assert (len(graphs), len(other)) == (1, 0)


def test_inference_mode_and_its_absence_share_a_recording(net, tape, graphs):
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            inputs = x()
            assert torch.equal(graphs(affine, net, inputs), affine(net, inputs))
    assert tape.recordings == 1


def test_autocast_is_recorded_as_it_is(net, tape, graphs):
    for recordings, casting in ((1, True), (2, False), (2, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=casting):
            found = graphs(affine, net, x())
            assert torch.equal(found, affine(net, x()))
            assert (found == found.bfloat16()).all() == casting
        assert tape.recordings == recordings
    net.inner.weight.mul_(2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(graphs(affine, net, x()), affine(net, x()))


def test_what_cannot_be_recorded_runs_directly(net, tape, graphs):
    with torch.enable_grad():
        assert graphs(affine, net, x()).requires_grad
    assert tape.recordings == 0
    on_cpu = Graphs()
    assert torch.equal(on_cpu(affine, net, x()), affine(net, x()))
    assert len(on_cpu) == 0


def test_a_recording_that_fails_says_what_to_do(net):
    def record(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(InvalidInputError, match=r"capturing Something.*Leave out --compile"):
        Graphs(record)(affine, net, x())


def test_a_recording_that_fails_leaves_the_state_as_it_was(net):
    def record(function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing")

    state = (torch.full((3,), 2.0),), torch.zeros(1)
    with pytest.raises(InvalidInputError, match="could not be recorded"):
        Graphs(record)(accumulate, net, x(), state)
    assert torch.equal(state[0][0], torch.full((3,), 2.0))


def test_errors_of_the_function_itself_are_raised_as_they_are(net, graphs):
    state = (torch.zeros(3),), torch.zeros(1)

    def fails(module, inputs, state):
        state[0][0].add_(1)
        return module.inner(inputs["x"][:, :2])

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        graphs(fails, net, x(), state)
    assert torch.equal(state[0][0], torch.zeros(3))
    assert len(graphs) == 0


def test_running_out_of_memory_while_recording_is_not_the_functions_fault(net):
    def record(function):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Graphs(record)(affine, net, x())


def test_threads_do_not_share_a_recording_at_the_same_time(net):
    """Each waits for the others between its inputs and its result."""
    meeting = threading.Barrier(2)

    def record(function):
        output = function()

        def replay():
            try:  # nobody else comes while this one waits
                meeting.wait(timeout=0.02)
            except threading.BrokenBarrierError:
                meeting.reset()
            output.copy_(function())

        return replay, output

    graphs, wrong = Graphs(record), []

    def act(seed):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(graphs(affine, net, x(seed=seed)), affine(net, x(seed=seed))):
                    wrong.append(seed)

    threads = [threading.Thread(target=act, args=(seed,)) for seed in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_a_function_may_ask_for_a_recording_of_its_part(net, graphs):
    def outer(module, inputs):
        return graphs(affine, module, inputs) * 2

    assert torch.equal(graphs(outer, net, x()), 2 * affine(net, x()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_graphs(net):
    net, graphs = net.cuda(), Graphs()
    state = ((torch.zeros(3, device="cuda"),), torch.zeros(1, device="cuda"))
    twin = ((torch.zeros(3, device="cuda"),), torch.zeros(1, device="cuda"))
    for rows in (2, 2, 5, 2):
        for seed in range(3):
            inputs = {"x": x(rows, seed)["x"].cuda()}
            torch.testing.assert_close(graphs(affine, net, inputs), affine(net, inputs))
            torch.testing.assert_close(
                graphs(accumulate, net, inputs, state), accumulate(net, inputs, twin)
            )
        net.inner.weight.add_(0.1)
    assert len(graphs) == 4
    with pytest.raises(InvalidInputError, match="could not be recorded"):
        graphs(lambda module, inputs: inputs["x"] * float(inputs["x"].sum()), net, inputs)
