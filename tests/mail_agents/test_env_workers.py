"""Environments in processes of their own: the same episodes, and a clean end whatever happens."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from toybox.faults import ENV_ID as FAULTY
from toybox.faults import STATES
from toybox.world import ENV_ID, demonstrations

import mail_agents
from mail_agents.data.dataset import MemoryDataset
from mail_agents.env_workers import EnvironmentFailedError, WorkerEnvironments, WorkerPool
from mail_agents.environments import LocalEnvironments, Move, Start, env_maker
from mail_agents.errors import InvalidInputError
from mail_agents.rollout import evaluate


@pytest.fixture(scope="module")
def agent():
    """A network with history and sampling noise, so that every difference would show."""
    dataset = MemoryDataset(demonstrations(4))
    agent = mail_agents.make(
        "mail/d-ma-ddpm",
        dataset.features,
        device="cpu",
        width=8,
        decoder={"layers": 1},
        diffusion_steps=2,
        history=2,
        horizon=2,
        execute=1,
    )
    agent.fit_statistics(dataset)
    return agent


def facts(evaluation):
    return [
        (e.index, e.seed, e.success, e.episode_return, e.length, e.plans, e.init_state)
        for e in evaluation.episodes
    ]


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="looks at processes in /proc"
)


def hosts(parent: int | None = None) -> set[int]:
    """Processes that host environments, children of one process."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ...", where the name may hold anything
            state, above = stat.read_text().rpartition(")")[2].split()[:2]
            line = (stat.parent / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z" and int(above) == (parent or os.getpid()):
            found |= {int(stat.parent.name)} if "mail_agents.env_host" in line else set()
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that have not ended, after some patience."""
    deadline = time.monotonic() + 10
    while pids and time.monotonic() < deadline:
        pids = {pid for pid in pids if _runs(pid)}
        time.sleep(0.02)
    return pids


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def no_orphans():
    """Every process started in a test has ended after it."""
    yield
    assert not hosts()


# ---- the same episodes -------------------------------------------------------------------------


def test_episodes_do_not_depend_on_processes(agent):
    play = {"seed": 3, "env_kwargs": {"terminate": True}}
    alone = facts(evaluate(agent, ENV_ID, 7, n_envs=1, **play))
    assert len({row[4] for row in alone}) > 1, "episodes end together: nothing is tested"
    for workers, n_envs in ((2, 2), (2, None), (3, 5)):
        found = evaluate(agent, ENV_ID, 7, workers=workers, n_envs=n_envs, **play)
        assert facts(found) == alone, (workers, n_envs)


def test_recordings_are_the_same(agent):
    play = {
        "record": [0, 2],
        "env_kwargs": {"render_mode": "rgb_array", "terminate": True},
        "max_steps": 6,
    }
    here = evaluate(agent, ENV_ID, 3, **play)
    there = evaluate(agent, ENV_ID, 3, workers=2, **play)
    assert facts(here) == facts(there)
    assert sorted(there.frames) == [0, 2]
    assert (here.fps, here.protocol) == (there.fps, there.protocol)
    for index, frames in here.frames.items():
        assert len(frames) == here.episodes[index].length + 1
        np.testing.assert_array_equal(frames, there.frames[index])
    with pytest.raises(InvalidInputError, match="render_mode='rgb_array'"):
        evaluate(agent, ENV_ID, 1, workers=2, record=[0])


def test_outcomes_are_those_of_this_process():
    kwargs = {"terminate": True, "size": 3}
    here = LocalEnvironments(env_maker(ENV_ID, kwargs, 2), 3, 9)
    pool = WorkerPool(2)
    there = WorkerEnvironments(pool, ENV_ID, kwargs, 2, count=3, most=9)
    try:
        assert len(here) == len(there) == 3
        assert here.facts == there.facts
        assert there.facts.max_steps == 2
        for envs in (here, there):
            envs.first = envs.reset({i: Start(10 + i, None, False) for i in (2, 0, 1)})
            envs.then = envs.step({i: Move(np.zeros(3, np.float32), False) for i in (1, 2)})
            envs.last = envs.step({2: Move(np.ones(3, np.float32), False)})
        for name in ("first", "then", "last"):
            one, other = getattr(here, name), getattr(there, name)
            assert list(one) == list(other)
            for number in one:
                assert one[number].observation.keys() == other[number].observation.keys()
                np.testing.assert_equal(one[number].observation, other[number].observation)
                assert one[number][1:] == other[number][1:]
        assert there.last[2].truncated
        assert there.last[2].success is False
    finally:
        here.close()
        there.close()
        pool.close()
        there.close()  # harmless
        pool.close()


def test_processes_serve_one_evaluation_after_the_other(agent):
    with WorkerPool(2) as pool:
        first = evaluate(agent, ENV_ID, 5, workers=pool)
        processes = hosts()
        assert len(processes) == 2
        evaluate(agent, FAULTY, 1, workers=pool)
        assert facts(evaluate(agent, ENV_ID, 5, workers=pool)) == facts(first)
        assert hosts() == processes
        # After an error they are new ones: the others had been asked and not been heard.
        with pytest.raises(EnvironmentFailedError):
            evaluate(agent, FAULTY, 2, workers=pool, env_kwargs={"fault": "step"})
        assert not hosts()
        assert facts(evaluate(agent, ENV_ID, 5, workers=pool)) == facts(first)
    with pytest.raises(InvalidInputError, match="workers=2 needs an environment given by id"):
        evaluate(agent, lambda: gymnasium.make(ENV_ID), 1, workers=pool)


# ---- how many ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_envs", "workers", "episodes", "suggested", "count", "processes"),
    [
        (None, 1, 30, None, 20, 0),
        (None, 1, 4, None, 4, 0),
        (None, 1, 5, 1, 1, 0),
        (None, 2, 5, 1, 2, 2),
        (None, 2, 5, 3, 3, 2),
        (3, 2, 5, 1, 3, 2),
        (1, 3, 5, None, 1, 1),
        (None, 3, 1, None, 1, 1),
    ],
)
def test_how_many_environments(
    agent, monkeypatch, n_envs, workers, episodes, suggested, count, processes
):
    seen = []

    def spy(cls):
        close = cls.close

        def closing(self):
            seen.append((len(self), getattr(self, "_hosts", 0)))
            close(self)

        monkeypatch.setattr(cls, "close", closing)

    spy(LocalEnvironments)
    spy(WorkerEnvironments)
    evaluate(
        *(agent, FAULTY, episodes),
        n_envs=n_envs,
        workers=workers,
        env_kwargs={"parallel": suggested},
        max_steps=1,
    )
    assert seen == [(count, processes)]


# ---- initial states ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_episodes_take_the_initial_states_in_turn(agent, workers):
    play = {"workers": workers, "env_kwargs": {"init_states": STATES}, "max_steps": 1}
    found = evaluate(agent, FAULTY, STATES + 2, **play)
    assert [e.init_state for e in found.episodes] == [*range(STATES), 0, 1]
    # The reward of this world is the state it was told to start in.
    assert [e.episode_return for e in found.episodes] == [*range(STATES), 0, 1]
    assert found.protocol["init_states"] == STATES
    assert len({e.seed for e in found.episodes}) == STATES + 2
    (chosen,) = evaluate(agent, FAULTY, [STATES + 1], **play).episodes
    assert chosen.init_state == 1


def test_without_initial_states_the_seed_decides(agent):
    found = evaluate(agent, FAULTY, 2, max_steps=1)
    assert [e.init_state for e in found.episodes] == [None, None]
    assert [e.episode_return for e in found.episodes] == [-1, -1]  # no options were given
    assert found.protocol["init_states"] is None


# ---- ends --------------------------------------------------------------------------------------


def test_an_error_of_the_environment_has_its_traceback(agent):
    for fault, line in (("make", "__init__"), ("reset", "reset"), ("step", "step")):
        with pytest.raises(EnvironmentFailedError) as caught:
            evaluate(agent, FAULTY, 2, workers=2, env_kwargs={"fault": fault})
        message = str(caught.value)
        assert "Process 1 with environments 'toybox.faults:toybox/Faulty-v0' failed" in message
        assert f"in {line}" in message
        assert f"ArithmeticError: a fault in {fault}" in message


def test_errors_that_explain_themselves_stay_what_they_are(agent):
    with pytest.raises(InvalidInputError, match=r"^no such camera$"):
        evaluate(agent, FAULTY, 2, workers=2, env_kwargs={"fault": "explained"})
    with pytest.raises(gymnasium.error.NameNotFound, match="Pointt"):
        evaluate(agent, "toybox:toybox/Pointt-v0", 2, workers=2)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("exit", "exit status 3"),
        ("killed", r"signal 9 .*memory.*--n-envs.*--workers"),
        ("crash", r"signal 11"),
        ("unsendable", "cannot pickle"),
    ],
)
def test_a_process_that_ends_is_named(agent, fault, words):
    with pytest.raises(EnvironmentFailedError, match=words):
        evaluate(agent, FAULTY, 2, workers=2, env_kwargs={"fault": fault})


def test_a_process_that_is_killed_in_the_middle(agent):
    def kill():
        while not (found := hosts()):
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(min(found), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(EnvironmentFailedError, match="signal 9"):
        evaluate(agent, FAULTY, 4, workers=2, env_kwargs={"fault": "slow"}, max_steps=10_000)
    thread.join()


def start(tmp_path: Path) -> tuple[subprocess.Popen, set[int]]:
    """A script without a main guard that evaluates forever in two processes."""
    script = tmp_path / "forever.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import signal

            import mail_agents
            from mail_agents.features import FeatureSpec
            from toybox.world import PointEnv

            # A shell that starts the tests in the background has them ignore Ctrl-C.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("The script runs.", flush=True)
            env = PointEnv()
            features = FeatureSpec.from_spaces(env.observation_space, env.action_space)
            agent = mail_agents.make("random", features, device="cpu")
            options = dict(workers=2, env_kwargs={{"fault": "slow"}}, max_steps=10**9)
            mail_agents.evaluate(agent, {FAULTY!r}, 2, **options)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(hosts(process.pid)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # into the episodes
    return process, hosts(process.pid)


def test_control_c_ends_everything_quietly(tmp_path):
    process, children = start(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert output.count("The script runs.") == 1, "the script ran again in another process"
    assert output.rstrip().endswith("KeyboardInterrupt")
    assert output.count("Traceback") == 1
    assert not alive(children)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    process, children = start(tmp_path)
    process.kill()
    process.communicate()
    assert not alive(children)


def test_torch_is_not_imported_for_an_environment(agent):
    with pytest.raises(EnvironmentFailedError, match="torch is loaded: False, main: no"):
        evaluate(agent, FAULTY, 1, workers=2, env_kwargs={"fault": "modules"})


# ---- refusals ----------------------------------------------------------------------------------


def test_what_other_processes_cannot_make_is_refused(agent):
    with pytest.raises(InvalidInputError, match=r"workers=2 needs an environment given by id"):
        evaluate(agent, lambda: gymnasium.make(ENV_ID), 1, workers=2)
    with pytest.raises(InvalidInputError, match="plain values"):
        evaluate(agent, ENV_ID, 1, workers=2, env_kwargs={"size": lambda: 2})
    gymnasium.register("only-here/Point-v0", entry_point=lambda: None)
    try:
        with pytest.raises(InvalidInputError, match="registered by this script only"):
            evaluate(agent, "only-here/Point-v0", 1, workers=2)
    finally:
        gymnasium.registry.pop("only-here/Point-v0")
    for workers in (0, -1):
        with pytest.raises(InvalidInputError, match=f"workers={workers}"):
            evaluate(agent, ENV_ID, 1, workers=workers)


def test_an_id_registered_here_by_a_package_is_found_there(agent):
    found = evaluate(agent, "toybox/Point-v0", 2, workers=2)
    assert facts(found) == facts(evaluate(agent, "toybox/Point-v0", 2))
