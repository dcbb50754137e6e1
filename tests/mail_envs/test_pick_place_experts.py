"""The experts of robosuite and LIBERO solve their tasks, the same way every time."""

import gymnasium
import mujoco
import numpy as np
import pytest

from mail_agents.data.episode import Episode
from mail_agents.errors import InvalidInputError
from mail_envs.experts import collect_episodes, make_expert, run_attempt
from mail_envs.grasps import Scene, about_z
from mail_envs.pick_place import Hand, PlannedExpert, rotation_vector

pytest.importorskip("robosuite", reason="robosuite is not installed (extra 'robosuite')")

SOUP = "mail_envs:libero_object/pick_up_the_alphabet_soup_and_place_it_in_the_basket"
BOWL = (
    "mail_envs:libero_spatial/pick_up_the_black_bowl_next_to_the_ramekin_and_place_it_on_the_plate"
)


@pytest.mark.parametrize("angle", [0.0, 0.3, -2.0, 3.0])
def test_rotation_vector(angle: float) -> None:
    np.testing.assert_allclose(rotation_vector(about_z(angle)), [0, 0, angle], atol=1e-9)


def test_a_scene_without_a_panda_is_refused() -> None:
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    with pytest.raises(InvalidInputError, match="Panda"):
        Hand(Scene(model, mujoco.MjData(model)))


def test_the_hand_goes_where_it_is_told() -> None:
    env = gymnasium.make("mail_envs:robosuite/Lift")
    env.reset(seed=0)
    hand = Hand(Scene(env.get_wrapper_attr("model"), env.get_wrapper_attr("data")))
    down, closing = hand.upright()
    assert np.abs(down @ [0, 0, 1] - [0, 0, -1]).max() < 1e-9
    np.testing.assert_allclose(np.sort(np.abs(closing)), [0, 0, 1], atol=0.1)
    turned, target = about_z(0.4) @ down, hand.position + np.array([0.05, -0.1, 0.05])
    actions = list_and_step(env, hand.go(target, turned, 1.0, within=0.005, steps=80))
    assert np.linalg.norm(hand.position - target) < 0.01
    assert len(actions) < 80
    assert np.abs(actions).max() <= 1.0
    assert np.abs(np.stack(actions)[:, 3:6]).max() <= 0.5
    assert hand.opening < 0.005  # it closed on nothing
    env.close()


def list_and_step(env: gymnasium.Env, motion) -> list[np.ndarray]:
    actions = []
    for action in motion:
        env.step(action)
        actions.append(action)
    return actions


@pytest.mark.parametrize("task", ["Lift", "Stack", "PickPlaceCan", "NutAssemblySquare"])
def test_robosuite_experts(task: str) -> None:
    env = gymnasium.make(f"mail_envs:robosuite/{task}", success_hold=5)
    expert = make_expert(env)
    episode = run_attempt(env, expert, seed=1, noise_std=0.05)
    env.close()
    assert episode.success
    assert episode.terminations[-1]
    assert episode.meta["expert"].startswith("mail_envs.robosuite_experts.")
    assert {"robosuite", "mujoco"} <= set(episode.meta["versions"])
    # The gripper is a switch: noise does not touch it.
    assert set(np.unique(episode.actions[:, 6])) <= {-1.0, 1.0}


def test_robosuite_tasks_without_an_expert() -> None:
    env = gymnasium.make("mail_envs:robosuite/Door")
    with pytest.raises(InvalidInputError, match=r"no scripted expert for robosuite/Door.*Lift"):
        make_expert(env)
    env.close()


def test_an_expert_needs_a_reset() -> None:
    env = gymnasium.make("mail_envs:robosuite/Lift")
    expert = make_expert(env)
    assert isinstance(expert, PlannedExpert)
    with pytest.raises(InvalidInputError, match=r"reset\(\)"):
        expert.act({})
    env.close()


def demonstrate(env_id: str) -> Episode:
    kwargs = {"cameras": [], "initial": "sampled", "success_hold": 10, "goal_state": True}
    return next(collect_episodes(env_id, 1, seed=3, noise_std=0.1, env_kwargs=kwargs))


@pytest.mark.usefixtures("libero_assets")
def test_libero_expert_repeats_itself_bit_for_bit() -> None:
    first, again = demonstrate(SOUP), demonstrate(SOUP)
    assert first.success
    assert 60 < len(first) < 250
    np.testing.assert_array_equal(first.actions, again.actions)
    np.testing.assert_array_equal(first.infos["states"], again.infos["states"])
    assert {"hf-libero", "robosuite"} <= set(first.meta["versions"])
    assert "options" not in first.meta  # its own placement, not one kept for the evaluation


@pytest.mark.usefixtures("libero_assets")
def test_libero_expert_takes_a_bowl_by_its_rim() -> None:
    episode = demonstrate(BOWL)
    assert episode.success
    assert 60 < len(episode) < 250


@pytest.mark.usefixtures("libero_assets")
def test_libero_expert_starts_from_stored_states_too_and_tries_again() -> None:
    env = gymnasium.make(SOUP, cameras=[])
    expert = make_expert(env)
    observation, _ = env.reset(seed=0, options={"init_state": 7})
    expert.reset()
    model, data = env.get_wrapper_attr("model"), env.get_wrapper_attr("data")
    can = env.get_wrapper_attr("body_id")("alphabet_soup_1")
    knocked = success = False
    for _ in range(590):
        observation, _, terminated, _, info = env.step(expert.act(observation))
        success = success or info["success"]
        if not knocked and data.xpos[can][2] > 0.2:  # take it away while it is carried
            address = model.jnt_qposadr[model.body_jntadr[can]]
            data.qpos[address : address + 3] = [0.05, -0.15, 0.06]
            knocked = True
        if terminated:
            break
    env.close()
    assert knocked
    assert success


@pytest.mark.usefixtures("libero_assets")
def test_goals_beyond_the_libero_expert_are_named() -> None:
    env = gymnasium.make("mail_envs:libero_goal/turn_on_the_stove", cameras=[])
    with pytest.raises(InvalidInputError, match=r"stove wants 'turnon.*measure_experts"):
        make_expert(env)
    env.close()
