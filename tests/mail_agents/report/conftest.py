import numpy as np
import pytest

from mail_agents.report import RunResult, TaskResult, Video


def episodes(outcomes, first_seed=1000):
    return [
        {"index": i, "seed": first_seed + i, "success": s, "episode_return": float(i), "length": 9}
        for i, s in enumerate(outcomes)
    ]


def task(name, solved, n=20):
    return TaskResult(name, episodes([i < solved for i in range(n)]))


def run(agent, label, solved, seed=0, parameters=1_000_000, **fields):
    """A made-up run that solves the first ``solved[task]`` of 20 episodes."""
    curve = [(step, float(np.exp(-step / 100) + 0.01)) for step in range(0, 300, 2)]
    return RunResult(
        agent=agent,
        label=label,
        dataset="demo",
        seed=seed,
        parameters=parameters,
        train_steps=300 if parameters else 0,
        train_seconds=61.0 if parameters else 0.0,
        curve=curve if parameters else [],
        evaluations={"last": [task(name, k) for name, k in solved.items()]},
        config={"history": 1, "horizon": 5, "execute": 5, "width": [8, 8]},
        **fields,
    )


@pytest.fixture
def results(tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"not really a film")
    return [
        run("mail/ed-ma-bc", "ED-Ma BC", {"reach": 20, "pick": 15}, videos=[
            Video(str(clip), "reach", True, "episode 3"),
            Video(str(tmp_path / "gone.mp4"), "pick", False),
        ]),
        run("mail/ed-tr-bc", "ED-Tr BC", {"reach": 19, "pick": 6}),
        run("mail/d-ma-bc", "D-Ma BC", {"reach": 18, "pick": 14}),
        run("random", "random", {"reach": 0, "pick": 0}, parameters=0),
    ]  # fmt: skip
