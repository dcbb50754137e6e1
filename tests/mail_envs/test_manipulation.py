"""What LIBERO's and robosuite's worlds share, with a simulator that is only pretended."""

import importlib.util
from typing import Any

import gymnasium
import numpy as np
import pytest

from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_envs import manipulation
from mail_envs.manipulation import ManipulationEnv, PlacementError
from mail_envs.manipulation_inputs import checked_cameras
from mail_envs.robosuite_setup import import_robosuite

# Not importorskip: a plain import prints, and opens a log file in /tmp.
if importlib.util.find_spec("robosuite") is None:
    pytest.skip("robosuite is not installed (extra 'robosuite')", allow_module_level=True)
import_robosuite("these tests")


class PretendedData:
    time = 0.0

    def __init__(self) -> None:
        self.qpos, self.qvel = np.zeros(2), np.zeros(2)


class PretendedSim:
    """As much of robosuite as the shared class touches; the goal is qpos[0] >= 1."""

    action_spec = (-np.ones(2), np.ones(2))
    reached_by_luck = ()

    def __init__(self) -> None:
        self.sim = self
        self.model = self
        self.data = self
        self._model = self
        self._data = PretendedData()
        self.nq = self.nv = 2
        self.jnt_type = self.jnt_qposadr = ()
        self._observables: dict[str, Any] = {}
        self.steps = 0
        self.placements = 0

    def add_observable(self, observable: Any) -> None:
        self._observables[observable.name] = observable

    def _update_observables(self, force: bool = False) -> None:
        pass

    def _get_observations(self) -> dict[str, np.ndarray]:
        return {"qpos": self._data.qpos.copy()}

    def reset(self) -> None:
        from robosuite.utils.errors import RandomizationError

        self.placements += 1
        if np.random.rand() < 0.5:
            raise RandomizationError("objects do not fit")
        self._data.qpos[:] = [0.0, np.random.rand()]
        self._data.qvel[:] = 0
        self.steps = 0

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, dict]:
        self.steps += 1
        self._data.qpos[0] += action[0]
        return {}, float(self._check_success()), False, {}

    def _check_success(self) -> bool:
        return bool(self._data.qpos[0] >= 1)

    def close(self) -> None:
        pass


class Pretended(ManipulationEnv):
    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "cameras": {},
            "image_size": 8,
            "orientation": "raw",
            "render_quality": "fast",
            "render_mode": None,
            "render_size": 8,
            "success_hold": 0,
        }
        super().__init__("pretended/x", PretendedSim, **{**defaults, **options})

    def _start(self, options: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _state_observation(self, raw: Any) -> dict[str, np.ndarray]:
        return {"qpos": raw["qpos"]}


def test_success_needs_the_goal_to_stay_reached():
    env = Pretended(success_hold=2)
    env.reset(seed=0)
    moves = [1, 0, -1, 1, 0, 0]  # reached twice, lost, reached thrice
    ends = [env.step(np.array([move, 0.0])) for move in moves]
    assert [end[2] for end in ends] == [False] * 5 + [True]
    assert [end[4]["success"] for end in ends] == [False] * 5 + [True]
    assert [end[1] for end in ends] == [1, 1, 0, 1, 1, 1]
    with pytest.raises(gymnasium.error.ResetNeeded, match="ended in success"):
        env.step(np.zeros(2))
    env.reset()
    assert env.step(np.zeros(2))[4]["success"] is False


def test_success_at_once_by_default():
    env = Pretended()
    env.reset(seed=0)
    _, _, terminated, truncated, info = env.step(np.array([1.0, 0]))
    assert (terminated, truncated, info["success"]) == (True, False, True)


def test_placement_is_drawn_again_until_it_fits_and_the_seed_decides():
    env = Pretended()
    states = [env.reset(seed=seed)[1]["state"] for seed in range(8)]
    assert env.robosuite_env.placements > 8
    before = np.random.get_state()[1].copy()
    assert all(
        np.array_equal(env.reset(seed=seed)[1]["state"], state) for seed, state in enumerate(states)
    )
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert len({state[2] for state in states}) == 8
    np.testing.assert_array_equal(
        Pretended().reset(seed=2**33)[1]["state"], env.reset(seed=2**33)[1]["state"]
    )


def test_placements_that_never_fit_are_given_up(monkeypatch):
    from robosuite.utils.errors import RandomizationError

    def fail(self):
        raise RandomizationError("objects do not fit")

    monkeypatch.setattr(manipulation, "_PLACEMENTS", 3)
    env = Pretended()
    monkeypatch.setattr(PretendedSim, "reset", fail)
    with pytest.raises(PlacementError, match="pretended/x: the objects did not fit in 3"):
        env.reset(seed=0)


def test_a_closed_environment_says_so():
    env = Pretended(render_mode="rgb_array")
    env.reset(seed=0)
    env.close()
    env.close()
    for use in (env.reset, env.render, env.model_xml, lambda: env.step(np.zeros(2))):
        with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="pretended/x is closed"):
            use()


def test_actions_are_checked_and_keep_double_precision():
    env = Pretended()
    with pytest.raises(gymnasium.error.ResetNeeded, match="has not begun"):
        env.step(np.zeros(2))
    env.reset(seed=0)
    for bad in ([np.nan, 0], [np.inf, 0]):
        with pytest.raises(InvalidInputError, match="not finite"):
            env.step(np.array(bad))
    with pytest.raises(InvalidInputError, match="not a batch"):
        env.step(np.zeros((1, 2)))
    state = env.step(np.array([1 / 3, 0]))[4]["state"]
    assert state[1] == 1 / 3
    assert env.step(np.array([-9.0, 0]))[4]["state"][1] == 1 / 3 - 1


def test_options_are_checked():
    env = Pretended()
    with pytest.raises(InvalidInputError, match=r"no reset option 'init_state'.*Valid: state"):
        env.reset(options={"init_state": 1})
    for bad in (np.zeros(4), np.full(5, np.nan), "abc", None, [[1], [2, 3]]):
        with pytest.raises(InvalidInputError, match="5 finite numbers"):
            env.reset(options={"state": bad})


def test_arguments_are_checked():
    with pytest.raises(InvalidInputError, match="render mode 'human'"):
        Pretended(render_mode="human")
    for bad in (-1, 1.5, True, "2"):
        with pytest.raises(InvalidInputError, match=r"success_hold is .*whole number"):
            Pretended(success_hold=bad)
    with pytest.raises(InvalidInputError, match="Image size True"):
        Pretended(image_size=True)
    with pytest.raises(InvalidInputError, match="Did you mean 'upright'"):
        Pretended(orientation="uprigth")
    with pytest.raises(InvalidInputError, match="Image size 0"):
        Pretended(image_size=0)
    with pytest.raises(InvalidInputError, match="render quality 'slow'"):
        Pretended(render_quality="slow")
    with pytest.raises(InvalidInputError, match=r"cameras=\('a',\)"):
        checked_cameras("a", ("a",))
    with pytest.raises(InvalidInputError, match="twice"):
        checked_cameras(("a", "a"), ("a",))
    with pytest.raises(UnknownNameError, match="camera"):
        checked_cameras(("b",), ("a",))


def test_render_without_a_mode_warns():
    env = Pretended()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.render() is None
