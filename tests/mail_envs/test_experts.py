"""Scripted experts and the episodes they give: reproducible, honest about noise and failures."""

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest

from mail_agents.data.episode import Episode
from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_agents.seeding import derive_env_seed
from mail_envs import command_line, experts
from mail_envs.command_line import check_env_kwargs, parse_env_kwargs, resolve_tasks
from mail_envs.experts import (
    ExpertFailedError,
    MetaWorldExpert,
    collect_episodes,
    collection_kwargs,
    make_expert,
    run_attempt,
    worker_pool,
)

REACH = "mail_envs:metaworld/reach-v3"


def same(first: Episode, second: Episode) -> bool:
    arrays = ("actions", "rewards", "terminations", "truncations")
    return (
        all(np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays)
        and all(np.array_equal(first.observations[k], second.observations[k]) for k in ("state",))
        and (first.task, first.seed, first.meta) == (second.task, second.seed, second.meta)
    )


@pytest.mark.parametrize(
    "task",
    ["reach-v3", "drawer-open-v3", "button-press-topdown-v3", "pick-place-v3", "window-open-v3"],
)
def test_expert_solves_its_task(task: str) -> None:
    env = gymnasium.make(f"mail_envs:metaworld/{task}")
    expert = make_expert(env)
    assert isinstance(expert, MetaWorldExpert)
    assert expert.name.startswith("metaworld.policies.Sawyer")
    for attempt in range(3):
        episode = run_attempt(env, expert, attempt=attempt)
        assert episode.success
        assert all(action in env.action_space for action in episode.actions)


def test_an_episode_is_complete() -> None:
    (episode,) = collect_episodes(REACH, 1, seed=4)
    length = len(episode)
    assert episode.task == "reach-v3"
    assert episode.seed == derive_env_seed(4, "data", 0)
    assert episode.observations["state"].shape == (length + 1, 39)
    assert episode.actions.dtype == np.float32
    assert episode.terminations.tolist() == [False] * (length - 1) + [True]
    assert not episode.truncations.any()
    meta = dict(episode.meta)
    assert set(meta.pop("versions")) == {"gymnasium", "metaworld", "mujoco", "numpy"}
    assert meta == {
        "success": True,
        "source_id": "reach-v3/000000",
        "env_id": REACH,
        "expert": "metaworld.policies.SawyerReachV3Policy",
        "noise_std": 0.0,
        "attempt": 0,
    }
    # Replaying the recorded actions from the recorded seed gives the recorded observations.
    env = gymnasium.make(REACH)
    states = [env.reset(seed=episode.seed)[0]["state"]]
    states += [env.step(action)[0]["state"] for action in episode.actions]
    assert np.array_equal(np.stack(states), episode.observations["state"])


def test_noise_is_executed_and_recorded() -> None:
    (clean,) = collect_episodes(REACH, 1)
    (noisy,) = collect_episodes(REACH, 1, noise_std=0.2)
    assert np.array_equal(clean.observations["state"][0], noisy.observations["state"][0])
    expert = MetaWorldExpert(gymnasium.make(REACH))
    intended = np.stack([expert.act({"state": s}) for s in noisy.observations["state"][:-1]])
    gripper = (noisy.actions - intended)[:, 3]  # the expert leaves it at 0, far from the bounds
    assert 0.1 < gripper.std() < 0.3
    assert abs(gripper).max() <= 1.0
    env = gymnasium.make(REACH)
    env.reset(seed=noisy.seed)
    assert np.array_equal(env.step(noisy.actions[0])[0]["state"], noisy.observations["state"][1])
    # Noise and placement are separate streams of the same attempt.
    placement = np.random.default_rng(noisy.seed).normal(0.0, 0.2, 4)
    assert not np.allclose((noisy.actions - intended)[0], placement, atol=1e-3)


@pytest.mark.parametrize("noise_std", [-0.1, np.nan, np.inf])
def test_bad_noise(noise_std: float) -> None:
    with pytest.raises(InvalidInputError, match="noise_std"):
        list(collect_episodes(REACH, 1, noise_std=noise_std))


def test_collection_is_reproducible_and_resumable() -> None:
    whole = list(collect_episodes(REACH, 4, seed=1))
    head = list(collect_episodes(REACH, 2, seed=1))
    tail = list(collect_episodes(REACH, 2, seed=1, first_attempt=2))
    assert all(same(*pair) for pair in zip(whole, head + tail, strict=True))
    assert not same(whole[0], next(collect_episodes(REACH, 1, seed=2)))


class Lottery(gymnasium.Env):
    """Solved at the second step by an even seed; otherwise the time limit ends it."""

    winning_step = 2
    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps, self.wins = 0, seed is not None and seed % 2 == 0
        return np.zeros(1), {"success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        won = self.wins and self.steps == self.winning_step
        return np.ones(1), 0.0, won, False, {"success": won}


class Player:
    name = "player"

    def __init__(self, env: gymnasium.Env) -> None:
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1

    def act(self, observation: np.ndarray) -> np.ndarray:
        return np.full(2, 0.5)


@pytest.fixture
def lottery(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    gymnasium.register("lottery/Draw-v0", Lottery, max_episode_steps=3)
    monkeypatch.setattr(experts, "_EXPERTS", {"lottery": Player})
    yield "lottery/Draw-v0"
    del gymnasium.registry["lottery/Draw-v0"]


def test_only_successes_are_kept_unless_asked(lottery: str) -> None:
    wins = [i for i in range(60) if derive_env_seed(0, "data", i) % 2 == 0]
    kept = list(collect_episodes(lottery, 10))
    assert [episode.meta["attempt"] for episode in kept] == wins[:10]
    assert all(episode.success and len(episode) == 2 for episode in kept)
    everything = list(collect_episodes(lottery, 10, only_successful=False))
    assert [episode.meta["attempt"] for episode in everything] == list(range(10))
    lost = next(episode for episode in everything if not episode.success)
    assert lost.truncations.tolist() == [False, False, True]
    assert not lost.terminations.any()
    assert lost.task == "Draw-v0"


def test_a_failing_expert_gives_up_and_reports_its_rate(
    lottery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lottery, "winning_step", -1)
    with pytest.raises(
        ExpertFailedError,
        match=r"solved 0 of 15 attempts\s*\(0%\).*3 successes.*--noise-std.*In Python",
    ):
        list(collect_episodes(lottery, 3))


def test_an_expert_may_keep_noise_off_a_dimension(
    lottery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = next(collect_episodes(lottery, 1, noise_std=0.1))
    monkeypatch.setattr(Player, "noise_scale", np.array([1.0, 0.0]), raising=False)
    scaled = next(collect_episodes(lottery, 1, noise_std=0.1))
    np.testing.assert_array_equal(scaled.actions[:, 0], plain.actions[:, 0])
    assert (scaled.actions[:, 1] == 0.5).all()
    assert (plain.actions[:, 1] != 0.5).all()


def test_tasks_of_every_world_are_found() -> None:
    assert resolve_tasks(["reach-v3", "door-*"]) == {
        task: f"mail_envs:metaworld/{task}"
        for task in ("reach-v3", "door-close-v3", "door-lock-v3", "door-open-v3", "door-unlock-v3")
    }
    assert resolve_tasks(["robosuite/Lift"]) == {"Lift": "mail_envs:robosuite/Lift"}
    spatial = resolve_tasks(["libero_spatial/*"])
    assert len(spatial) == 10
    assert all(env_id == f"mail_envs:libero_spatial/{task}" for task, env_id in spatial.items())
    assert len(resolve_tasks(["*"])) == 50  # a bare star is Meta-World


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("reach-v2", "Did you mean 'reach-v3'.*libero_object/"),
        ("libero_objects/*", "Did you mean 'libero_object'"),
        ("robosuite/Lifd", "Did you mean 'robosuite/Lift'"),
    ],
)
def test_unknown_tasks(pattern: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        resolve_tasks([pattern])


def test_one_name_for_two_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "list_worlds", lambda pattern: [f"mail_envs:{pattern}"])
    with pytest.raises(InvalidInputError, match="same task name"):
        resolve_tasks(["libero_10/x", "libero_90/x"])


def test_demonstrations_of_libero_leave_the_stored_states_alone() -> None:
    assert collection_kwargs("mail_envs:libero_goal/turn_on_the_stove") == {"initial": "sampled"}
    assert collection_kwargs(REACH) == {}


def test_keyword_arguments_from_a_command_line() -> None:
    given = {"goal_state": "true", "render_size": "64", "orientation": "raw"}
    expected = {"goal_state": True, "render_size": 64, "orientation": "raw"}
    assert parse_env_kwargs(given, {}) == expected
    with pytest.raises(InvalidInputError, match="may not hold 'cameras': a reason"):
        parse_env_kwargs({"cameras": "[]"}, {"cameras": "a reason"})


def test_keyword_arguments_that_no_world_takes() -> None:
    check_env_kwargs([REACH], ["cameras", "max_episode_steps"])
    for name in ("goal_state", "task"):  # the id says which task
        with pytest.raises(UnknownNameError, match=rf"reach-v3 '{name}'.*image_size"):
            check_env_kwargs([REACH], [name])


def test_worlds_without_an_expert() -> None:
    with pytest.raises(UnknownNameError, match="CartPole-v1"):
        make_expert(gymnasium.make("CartPole-v1"))


@pytest.mark.parametrize("bad", [{"n_episodes": 0}, {"first_attempt": -1}, {"in_flight": 0}])
def test_bad_counts(bad: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="at least"):
        list(collect_episodes(REACH, **{"n_episodes": 1, **bad}))
    with pytest.raises(InvalidInputError, match="workers is 0"), worker_pool(0):
        pass


def test_one_worker_is_this_process() -> None:
    with worker_pool(1) as pool:
        assert pool is None


@pytest.mark.usefixtures("gl")
def test_images_are_recorded() -> None:
    kwargs = {"cameras": ["corner2"], "image_size": 16, "max_episode_steps": 3}
    (episode,) = collect_episodes(REACH, 1, only_successful=False, env_kwargs=kwargs)
    assert episode.observations["corner2"].shape == (4, 16, 16, 3)
    assert episode.observations["corner2"].dtype == np.uint8
    assert episode.success is False
