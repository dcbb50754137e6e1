"""Images: upright, equal to upstream when asked, quiet at exit, explained when impossible."""

import os
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest

from mail_envs import rendering
from mail_envs.catalogue import METAWORLD_CAMERAS
from mail_envs.metaworld import _UPSIDE_DOWN
from mail_envs.rendering import OffscreenRenderer, select_gl_backend

LOOK = "import gymnasium; e = gymnasium.make('mail_envs:metaworld/reach-v3', cameras=('corner2',))"


def make(**kwargs: Any) -> gymnasium.Env:
    return gymnasium.make("mail_envs:metaworld/drawer-open-v3", **kwargs)


def _python(
    code: str, timeout: float | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": ":".join(sys.path), **env}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
    )


def test_cameras_that_hang_upside_down() -> None:
    env = make()
    env.reset(seed=0)
    sim = env.unwrapped._sim
    up = {sim.model.camera(i).name: sim.data.cam_xmat[i].reshape(3, 3)[2, 1] for i in range(7)}
    assert set(up) == set(METAWORLD_CAMERAS)
    assert {name for name, z in up.items() if z < -0.1} == _UPSIDE_DOWN


@pytest.mark.usefixtures("gl")
def test_observed_images() -> None:
    env = make(cameras=("corner2", "topview"), image_size=32)
    observation, _ = env.reset(seed=0)
    assert set(observation) == {"state", "corner2", "topview"}
    assert observation in env.observation_space
    image = observation["corner2"]
    assert image.flags.c_contiguous
    assert image.std() > 10
    same, _ = make(cameras=("corner2",), image_size=32).reset(seed=0)
    np.testing.assert_array_equal(same["corner2"], image)
    for _ in range(20):
        observation, *_ = env.step(np.array([1, 1, -1, 1], np.float32))
    assert np.abs(observation["corner2"].astype(int) - image).max() > 50
    assert image.std() > 10, "the first image was overwritten"
    env.close()


@pytest.mark.usefixtures("gl")
def test_stock_quality_is_upstream_turned_upright_and_fast_is_not() -> None:
    env = make(render_mode="rgb_array", render_quality="stock", render_size=64)
    env.reset(seed=1)
    ours = env.render()
    sim = env.unwrapped._sim
    sim.mujoco_renderer.width = sim.mujoco_renderer.height = 64
    sim.mujoco_renderer.camera_id = sim.model.camera("corner2").id
    upstream = sim.mujoco_renderer.render("rgb_array")
    sim.mujoco_renderer.close()
    np.testing.assert_array_equal(ours, upstream[::-1, ::-1])
    fast = make(render_mode="rgb_array", render_size=64)
    fast.reset(seed=1)
    difference = np.abs(fast.render().astype(int) - ours).mean()
    assert 1 < difference < 30
    env.close()
    fast.close()


@pytest.mark.usefixtures("gl")
def test_render_does_not_disturb_the_episode() -> None:
    plain, filmed = make(), make(render_mode="rgb_array", render_size=16)
    action = np.array([0.3, 0.5, -0.2, 1], np.float32)
    plain.reset(seed=2)
    filmed.reset(seed=2)
    for _ in range(5):
        frame = filmed.render()
        assert frame.shape == (16, 16, 3)
        one, two = plain.step(action), filmed.step(action)
        assert np.array_equal(one[0]["state"], two[0]["state"])
    filmed.close()


def test_render_without_a_mode_says_so() -> None:
    env = make().unwrapped
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="rgb_array"):
        assert env.render() is None


@pytest.mark.usefixtures("gl")
def test_renderer_follows_the_model_and_survives_close() -> None:
    import mujoco

    def scene(colour: str) -> tuple[Any, Any]:
        model = mujoco.MjModel.from_xml_string(
            "<mujoco><worldbody><camera name='c' pos='0 0 3'/><light pos='0 0 3'/>"
            f"<geom size='1' rgba='{colour} 1'/></worldbody></mujoco>"
        )
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        return model, data

    red, blue = scene("1 0 0"), scene("0 0 1")
    renderer = OffscreenRenderer(8)
    first = renderer.render(*red, "c")
    assert first[4, 4, 0] > first[4, 4, 2]
    second = renderer.render(*blue, "c")
    assert second[4, 4, 2] > second[4, 4, 0]
    renderer.close()
    renderer.close()
    np.testing.assert_array_equal(renderer.render(*red, "c"), first)
    renderer.close()
    # The model keeps its own settings; only our context was made with others.
    assert red[0].vis.quality.offsamples == 4


@pytest.mark.usefixtures("gl")
def test_no_display_no_variable_no_close_no_noise() -> None:
    result = _python(f"{LOOK}; print(e.reset(seed=0)[0]['corner2'].shape)")
    assert (result.returncode, result.stdout.strip()) == (0, "(128, 128, 3)"), result.stderr
    assert result.stderr == ""


FORK = """
import gymnasium
make = lambda: gymnasium.make("mail_envs:metaworld/reach-v3", cameras=("corner2",), image_size=8)
first = gymnasium.vector.AsyncVectorEnv([make])
first.reset(seed=0)
env = make()
env.reset(seed=0)
env.close()
first.step(first.action_space.sample())
print("made before drawing: works", flush=True)
gymnasium.vector.AsyncVectorEnv([make]).reset(seed=0)
"""


@pytest.mark.usefixtures("gl")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_drawing_in_a_child_of_a_process_that_drew_is_refused() -> None:
    result = _python(FORK, timeout=60)
    assert result.stdout.strip() == "made before drawing: works"
    assert result.returncode == 1
    assert "ForkedRenderingError" in result.stderr
    assert "context='spawn'" in result.stderr


def test_without_opengl_states_work_and_images_explain() -> None:
    result = _python(
        "import gymnasium; e = gymnasium.make('mail_envs:metaworld/reach-v3');"
        f"print(e.reset(seed=0)[0]['state'].shape, flush=True); {LOOK}; e.reset(seed=0)",
        MUJOCO_GL="disable",
    )
    assert result.stdout.strip() == "(39,)"
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "MissingDependencyError" in last
    assert "MUJOCO_GL is disable" in last
    assert "libegl1" in last


@pytest.mark.parametrize(
    ("installed", "given", "expected"),
    [
        ({"EGL", "OSMesa"}, None, "egl"),
        ({"OSMesa"}, None, "osmesa"),
        (set(), None, None),
        ({"EGL"}, "glfw", "glfw"),
    ],
)
def test_backend_choice(
    installed: set[str], given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering.sys, "platform", "linux")
    monkeypatch.setattr(
        rendering.ctypes.util, "find_library", lambda name: name if name in installed else None
    )
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if given:
        monkeypatch.setenv("MUJOCO_GL", given)
    select_gl_backend()
    assert rendering.os.environ.get("MUJOCO_GL") == expected
