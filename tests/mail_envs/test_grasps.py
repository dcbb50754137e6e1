"""Where a hand can close: shapes measured exactly, clear grasps preferred."""

import mujoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_envs.grasps import MAX_WIDTH, Scene, about_z, aligned_yaws, plan_grasps

Y = np.array([0.0, 1.0, 0.0])


def scene(bodies: str) -> Scene:
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{bodies}</worldbody></mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return Scene(model, data)


def box(name: str, position: str, half: str, more: str = "") -> str:
    return f'<body name="{name}" pos="{position}"><geom type="box" size="{half}" {more}/></body>'


def body(scene: Scene, name: str) -> int:
    return scene.model.body(name).id


def test_extent_is_the_smallest_box_along_the_given_axes() -> None:
    turned = (
        '<body name="b" pos="1 2 3" euler="0 0 30"><geom type="box" size="0.3 0.1 0.2"/></body>'
    )
    found = scene(turned)
    axes = about_z(np.pi / 6).T  # its rows are the box's own directions
    own = found.extent(body(found, "b"), axes)
    np.testing.assert_allclose(own.size, [0.6, 0.2, 0.4], atol=1e-9)
    np.testing.assert_allclose(own.centre @ axes, [1, 2, 3], atol=1e-9)
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)
    world = found.extent(body(found, "b"))
    wanted = [0.6 * cos + 0.2 * sin, 0.6 * sin + 0.2 * cos, 0.4]
    np.testing.assert_allclose(world.size, wanted, atol=1e-9)


def test_shapes_are_those_that_touch_of_a_body_and_its_parts() -> None:
    found = scene(
        '<body name="cabinet"><geom type="box" size="1 1 1"/>'
        '<geom type="box" size="9 9 9" contype="0" conaffinity="0"/>'
        '<body name="drawer"><geom type="box" size="2 1 1"/></body></body>'
        + box("cup", "5 0 0", ".1 .1 .1")
        + box("robot0_link", "0 0 5", ".1 .1 .1")
    )
    assert found.shapes(body(found, "cabinet")).tolist() == [0, 2]
    assert found.shapes(body(found, "drawer")).tolist() == [2]
    assert found.obstacles(body(found, "cabinet")).tolist() == [3]  # not the robot
    empty = scene('<body name="mark" pos="1 2 3"/>')
    assert empty.extent(body(empty, "mark")).centre.tolist() == [1, 2, 3]


def test_a_box_is_taken_across_its_narrow_side() -> None:
    found = scene(box("b", "0.5 0 0.05", ".06 .02 .05"))
    best, *others = plan_grasps(found, body(found, "b"), Y, rim=False)
    assert best.yaw == 0.0  # closes along y, where it is 4 cm wide
    np.testing.assert_allclose(best.point, [0.5, 0, 0.07], atol=1e-9)
    assert all(abs(grasp.yaw) < 1.5 for grasp in others)  # at a right angle it does not fit
    wide = scene(box("b", "0.5 0 0.05", ".06 .06 .05"))
    assert plan_grasps(wide, body(wide, "b"), Y, rim=False) == []
    assert MAX_WIDTH < 0.08


def test_a_flat_box_is_taken_above_the_table() -> None:
    found = scene(box("b", "0 0 0.009", ".04 .02 .009"))
    (best, *_) = plan_grasps(found, body(found, "b"), Y, rim=False)
    assert best.point[2] == pytest.approx(0.012)


def test_a_neighbour_turns_the_hand() -> None:
    cube = box("b", "0 0 0.05", ".02 .02 .05")
    beside = box("n", "0 0.06 0.05", ".02 .02 .05")  # where a finger would be at yaw 0
    alone, crowded = scene(cube), scene(cube + beside)
    assert plan_grasps(alone, body(alone, "b"), Y, rim=False)[0].yaw == 0.0
    grasps = plan_grasps(crowded, body(crowded, "b"), Y, rim=False)
    assert grasps[0].yaw != 0.0
    assert grasps[0].cost < 0.01
    assert next(g.cost for g in grasps if g.yaw == 0.0) > 0.01
    assert [g.cost for g in grasps] == sorted(g.cost for g in grasps)


def test_a_rim_is_taken_where_the_arm_reaches_and_nothing_is_near() -> None:
    bowl = box("bowl", "0.78 0 0.05", ".05 .05 .03")
    base = '<body name="robot0_base"><geom type="box" size=".01 .01 .01"/></body>'
    found = scene(base + bowl)
    near = plan_grasps(found, body(found, "bowl"), Y, rim=True)[0]
    assert near.point[0] < 0.75
    assert near.point[2] == pytest.approx(0.068)
    wall = box("wall", "0.68 0 0.1", ".02 .3 .1")
    blocked = scene(base + bowl + wall)
    assert plan_grasps(blocked, body(blocked, "bowl"), Y, rim=True)[0].point[0] > 0.75


def test_what_falls_out_of_reach_does_not_move() -> None:
    free = '<body name="{}" pos="{} 0 0"><freejoint/><geom size=".1"/></body>'
    found = scene(free.format("near", 1) + free.format("far", 5))
    assert not found.moving()
    found.data.qvel[6 + 2] = -3.0
    assert not found.moving()
    found.data.qvel[2] = -0.1
    assert found.moving()


@given(st.floats(-10.0, 10.0), st.floats(-3.0, 3.0), st.integers(0, 2))
def test_aligned_yaws_make_the_fingers_parallel_to_the_sides(
    angle: float, first: float, upright: int
) -> None:
    turn = about_z(angle) @ np.roll(np.eye(3), upright, axis=1)  # any side of the box may be up
    closing = np.array([np.cos(first), np.sin(first), 0.0])
    small, large = aligned_yaws(turn, closing)
    assert abs(small) <= np.pi / 4 + 1e-9
    assert abs(abs(large - small) - np.pi / 2) < 1e-9
    assert abs(large) <= np.pi / 2 + 1e-9
    for yaw in (small, large):
        along = turn.T @ about_z(yaw) @ closing
        assert np.sort(np.abs(along))[1] < 1e-6
