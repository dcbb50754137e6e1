"""Comparisons, files and a fake simulator shared by the tests of dataset adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import h5py
import numpy as np
import pytest

from mail_agents.data import Episode
from mail_agents.features import ImageSpace


@pytest.fixture(scope="session")
def same_episode() -> Callable[[Episode, Episode], None]:
    """Asserts bitwise equality of two episodes, dtypes included."""

    def check(left: Episode, right: Episode) -> None:
        for part in ("observations", "infos"):
            ours, theirs = getattr(left, part), getattr(right, part)
            assert set(ours) == set(theirs)
            for key in ours:
                assert ours[key].dtype == theirs[key].dtype, key
                assert ours[key].tobytes() == theirs[key].tobytes(), key
        for part in ("actions", "rewards", "terminations", "truncations"):
            ours, theirs = getattr(left, part), getattr(right, part)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), part
            assert ours.tobytes() == theirs.tobytes(), part
        assert (left.task, left.seed, left.meta) == (right.task, right.seed, right.meta)

    return check


MILK = "pick_up_the_milk_and_place_it_in_the_basket"
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
STEPS = 7


class DemoFiles:
    """Writes demonstration files with what LIBERO's and robomimic's scripts put into them."""

    milk, soup, steps = MILK, SOUP, STEPS
    #: Attributes of ``data`` of a published file of LIBERO.
    published: ClassVar = {
        "env_name": "Libero_Floor_Manipulation",
        "env_args": json.dumps({"type": 1, "env_name": "Libero_Floor_Manipulation"}),
        "problem_info": json.dumps({"problem_name": "libero_floor_manipulation"}),
        "bddl_file_name": f"chiliocosm/bddl_files/libero_object/{MILK}.bddl",
        "bddl_file_content": "(define (problem LIBERO_Floor_Manipulation))",
        "macros_image_convention": "opengl",
        "tag": "libero-v1",
    }

    def libero(
        self,
        path: Path,
        demos: int = 2,
        change: Callable[[h5py.File], Any] = lambda file: None,
        attributes: dict[str, str] | None = None,
    ) -> Path:
        """One file; every demonstration of ``STEPS`` steps, with two cameras of 8x8 pixels."""
        rng = np.random.default_rng(demos)
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for number in range(demos):
                group = file.create_group(f"data/demo_{number}")
                group.attrs["num_samples"] = STEPS
                group.attrs["model_file"] = "<mujoco/>"
                states = np.cumsum(rng.random((STEPS, 5)), axis=0)
                group.attrs["init_state"] = states[0]
                group["states"] = states
                group["actions"] = rng.uniform(-1, 1, (STEPS, 7))
                group["robot_states"] = rng.random((STEPS, 9))
                group["rewards"] = group["dones"] = np.eye(STEPS, dtype=np.uint8)[-1]
                for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                    images = rng.integers(0, 256, (STEPS, 8, 8, 3), dtype=np.uint8)
                    group[f"obs/{camera}"] = images
                for key, size in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2)):
                    group[f"obs/{key}"] = rng.random((STEPS, size))
            file["data"].attrs.update(self.published if attributes is None else attributes)
            file["data"].attrs["num_demos"] = demos
            file["data"].attrs["total"] = demos * STEPS
            change(file)
        return path

    def robosuite(
        self,
        path: Path,
        env_name: str = "Lift",
        change: Callable[[h5py.File], Any] = lambda file: None,
        **env_kwargs: Any,
    ) -> Path:
        """One file of robomimic: ``obs`` before the action, ``next_obs`` after it."""
        rng = np.random.default_rng(0)
        args = {
            "env_name": env_name,
            "type": 1,
            "env_version": "1.4.1",
            "env_kwargs": {
                "robots": ["Panda"],
                "controller_configs": {"type": "OSC_POSE", "control_delta": True},
                **env_kwargs,
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            group = file.create_group("data/demo_0")
            group.attrs["num_samples"] = STEPS
            group["actions"] = rng.uniform(-1, 1, (STEPS, 7))
            group["states"] = rng.random((STEPS, 5))
            group["rewards"] = np.eye(STEPS)[-1]
            group["dones"] = np.eye(STEPS, dtype=np.int64)[-1]
            poses = rng.random((STEPS + 1, 3))
            images = rng.integers(0, 256, (STEPS + 1, 8, 8, 3), dtype=np.uint8)
            for key, values in (("robot0_eef_pos", poses), ("agentview_image", images)):
                group[f"obs/{key}"], group[f"next_obs/{key}"] = values[:-1], values[1:]
            file["data"].attrs["env_args"] = json.dumps(args)
            file["data"].attrs["total"] = STEPS
            change(file)
        return path


@pytest.fixture(scope="session")
def demo_files() -> DemoFiles:
    """Writes demonstration files; see :class:`DemoFiles`."""
    return DemoFiles()


class Arm(gymnasium.Env):
    """A fake of LIBERO's environment: five numbers of state, which actions move."""

    metadata: ClassVar = {"record_infos": ("state",)}
    spec = None

    def __init__(self, folder: Path, orientation: str | None = "raw", **_: Any) -> None:
        self.orientation, self.folder = orientation, folder
        keys: dict[str, gymnasium.Space] = {
            f"{camera}_rgb": ImageSpace((8, 8, 3), orientation)
            for camera in ("agentview", "eye_in_hand")
        }
        for key, size in (("ee_pos", 3), ("ee_ori", 3), ("gripper_states", 2)):
            keys[key] = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        self.observation_space = gymnasium.spaces.Dict(keys)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        given = (options or {}).get("state")
        self.state = self.np_random.random(5) if given is None else np.array(given)
        return self.observe(), {"success": False, "state": self.state}

    def step(self, action):
        self.state = self.state + np.asarray(action, np.float64)[:5]
        success = bool(self.state[0] > 2)
        reward = float(success)
        return self.observe(), reward, success, False, {"success": success, "state": self.state}

    def observe(self):
        upright = np.zeros((8, 8, 3), np.uint8)
        upright[1, 2] = np.abs(self.state[:3] * 20).astype(np.uint8)
        flips = {"raw": upright[::-1], "rot180": upright[:, ::-1]}
        image = flips.get(str(self.orientation), upright)
        return {
            "agentview_rgb": image,
            "eye_in_hand_rgb": image,
            "ee_pos": self.state[:3],
            "ee_ori": self.state[1:4],
            "gripper_states": self.state[3:],
        }

    @property
    def env_args(self):
        # As a world made without cameras says it, which the recording was not.
        kwargs = {"control_freq": 20, "camera_names": ["birdview"], "camera_heights": 128}
        return {
            "type": 1,
            "env_name": "Libero_Arm",
            "bddl_file": f"bddl_files/{MILK}.bddl",
            "env_kwargs": kwargs,
        }

    @property
    def problem_info(self):
        return {"problem_name": "arm"}

    @property
    def bddl_path(self):
        path = self.folder / f"{MILK}.bddl"
        path.write_text("(define arm)")
        return str(path)

    def model_xml(self):
        return f"<mujoco model='{self.state[0]:.3f}'/>"


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Arm]:
    """Makes the fake environment, and makes ``gymnasium.make`` do so for LIBERO's ids."""
    make = gymnasium.make

    def fake(env_id: str, **kwargs: Any) -> gymnasium.Env:
        if not env_id.startswith("mail_envs:libero_"):
            return make(env_id, **kwargs)
        return Arm(tmp_path, **kwargs)

    monkeypatch.setattr(gymnasium, "make", fake)
    return lambda **kwargs: Arm(tmp_path, **kwargs)
