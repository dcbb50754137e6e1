"""scripts/evaluate.py at toy size, as a person would use it."""

import json
import re
from types import SimpleNamespace

import pytest
from toybox.world import ENV_ID, PointEnv, demonstrations, make_dataset

import mail_agents
from mail_agents.data.references import Reference
from mail_agents.data.store import open_dataset
from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature, FeatureSpec
from mail_agents.report.results import load_results
from mail_agents.suite import World
from mail_envs.libero_protocols import PROTOCOLS


@pytest.fixture
def evaluate(scripts, tmp_path):
    def run(*arguments):
        return scripts.run(tmp_path, "evaluate", *arguments, "--device", "cpu")

    return run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, point_dataset):
    """An untrained diffusion agent with an average: evaluation does not ask how good it is."""
    dataset = open_dataset(point_dataset)
    agent = mail_agents.make(
        "mail/d-ma-ddpm",
        dataset.features,
        device="cpu",
        width=8,
        decoder={"layers": 1},
        diffusion_steps=2,
    )
    agent.fit_statistics(dataset)
    return agent.save(tmp_path_factory.mktemp("artifact") / "agent.safetensors")


def test_an_artifact_knows_its_worlds(evaluate, artifact, tmp_path):
    arguments = ("--agent", artifact, "--episodes", 3, "--n-envs", 2)
    code, output = evaluate(*arguments, "--output", tmp_path / "out", "--videos", 1)
    assert code == 0, output
    assert "history 5, executes 5 of 5" in output
    assert "point: " in output
    assert "/3 solved" in output
    assert f"results  {tmp_path / 'out'}" in output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["point"]["n_episodes"] == 3
    assert summary["point"]["protocol"]["weights"] == "ema"
    episodes = (tmp_path / "out" / "point" / "episodes.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in episodes] == [0, 1, 2]
    assert list((tmp_path / "out" / "point").glob("*.mp4"))

    code, output = evaluate(*arguments, "--output", tmp_path / "out")
    assert code == 1
    assert "already holds an evaluation" in output

    # A directory that holds the artifact, other noise, other weights; JSON and nothing else.
    code, output = evaluate(
        *("--agent", artifact.parent, "--episodes", 3, "--weights", "raw", "--as-json"),
        *("--deterministic", "--seed", 5),
    )
    assert code == 0, output
    protocol = json.loads(output)["point"]["protocol"]
    assert (protocol["weights"], protocol["deterministic"], protocol["seed"]) == ("raw", True, 5)


def test_references_of_the_dataset_give_a_score(evaluate, tmp_path):
    scored = make_dataset(tmp_path / "scored", reference_scores={"point": {"min": -100, "max": 0}})
    arguments = ("--agent", "mean-action", "--episodes", 3, "--dataset", scored.path)
    code, output = evaluate(*arguments, "--output", tmp_path / "out")
    assert code == 0, output
    assert re.search(r"point: normalised score [\d.-]+ \[.*\], of -100 to 0 \(dataset\)", output)
    (result,) = load_results(tmp_path / "out" / "result.json")
    assert result.dataset == scored.info.name
    assert result.references == {"point": Reference(-100.0, 0.0)}
    assert result.worlds == {"point": ENV_ID.rpartition(":")[2]}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["point"]
    assert summary["normalised_score"] == pytest.approx(summary["return_mean"] + 100)
    assert summary["reference"]["source"] == "dataset"
    # Elsewhere the same returns would mean something else.
    code, output = evaluate(*arguments, "--env", ENV_ID, "--task", "point")
    assert code == 0, output
    assert "score" not in output


def test_target_returns(evaluate, tmp_path):
    dataset = make_dataset(tmp_path / "data")
    agent = mail_agents.make(
        "dt", dataset.features, device="cpu", d_model=8, layers=1, history=2, max_timestep=20
    )
    agent.fit_statistics(dataset)
    artifact = agent.save(tmp_path / "agent.safetensors")
    out = tmp_path / "out"
    code, output = evaluate(
        *("--agent", artifact, "--episodes", 2, "--target-returns", "-1", "-2.5", "--output", out)
    )
    assert code == 0, output
    (result,) = load_results(out / "result.json")
    assert list(result.by_target()) == ["-1", "-2.5"]
    assert result.parameters > 0
    assert result.train_steps == 0
    code, output = evaluate("--agent", "random", "--env", ENV_ID, "--target-returns", 1)
    assert code == 1
    assert "does not use target returns" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--videos", -1), "--videos starts at 0; got -1"),
        (("--episodes", 0), "--episodes starts at 1; got 0"),
        (("--max-steps", 0), "--max-steps starts at 1; got 0"),
        (("--task", "reach"), "--task describes the environment of --env"),
        (("--env-kwargs", "size", "3"), "--env-kwargs describes the environment of --env"),
    ],
)
def test_flags_that_mean_nothing_are_refused(evaluate, artifact, arguments, words):
    code, output = evaluate("--agent", artifact, *arguments)
    assert code == 1
    assert words in output
    assert "Traceback" not in output


def test_a_step_limit_is_for_every_world(evaluate, artifact):
    code, output = evaluate(
        "--agent", artifact, "--episodes", 2, "--max-steps", 2, "--as-json", "--deterministic"
    )
    assert code == 0, output
    assert json.loads(output)["point"]["protocol"]["max_steps"] == 2


def test_a_protocol_shows_the_images_that_an_agent_knows(load_script):
    module = load_script("evaluate")

    def agent(size, orientation):
        image = Feature("image", (size, size, 3), "uint8", orientation=orientation)
        action = Feature("state", (7,), "float32")
        return SimpleNamespace(features=FeatureSpec({"agentview_rgb": image}, action))

    module.check_images("mail", agent(128, "raw"))
    module.check_images("openvla", agent(256, "rot180"))
    module.check_images("openvla", agent(256, None))
    for size, orientation in ((128, "raw"), (256, "raw")):
        with pytest.raises(InvalidInputError, match=f"256 px rot180, .* {size} px raw"):
            module.check_images("openvla", agent(size, orientation))


def test_the_number_of_environments_changes_nothing(evaluate):
    arguments = ("--agent", "random", "--env", ENV_ID, "--episodes", 5, "--as-json")
    ways = (("--n-envs", 1), ("--n-envs", 4), ("--workers", 2))
    first, *others = (json.loads(evaluate(*arguments, *way)[1]) for way in ways)
    assert others == [first, first]


def test_reference_agents_from_a_world_or_a_dataset(evaluate, point_dataset):
    code, output = evaluate(
        *("--agent", "random", "--env", ENV_ID, "--episodes", 2, "--task", "reach"),
        *("--env-kwargs", "terminate", "true", "size", "3"),
    )
    assert code == 0, output
    assert "reach: " in output
    code, output = evaluate("--agent", "mean-action", "--dataset", point_dataset, "--episodes", 2)
    assert code == 0, output
    assert "point: " in output


def test_some_tasks_of_a_dataset(evaluate, tmp_path):
    tasks = ("push_the_box", "push_the_ball", "lift_the_box")
    specs = {task: {"id": ENV_ID} for task in tasks}
    env = PointEnv()
    dataset = mail_agents.write_dataset(
        tmp_path / "many",
        (episode for task in tasks for episode in demonstrations(1, task)),
        name="many",
        features=mail_agents.FeatureSpec.from_spaces(env.observation_space, env.action_space),
        env_specs=specs,
    )
    arguments = ("--agent", "random", "--dataset", dataset.path, "--episodes", 1, "--as-json")
    for patterns, found in (
        (("push_*",), set(tasks[:2])),
        (("*_box", "push_the_ball"), set(tasks)),
        (("lift_the_box",), {"lift_the_box"}),
    ):
        code, output = evaluate(*arguments, "--tasks", *patterns)
        assert code == 0, output
        assert set(json.loads(output)) == found
    code, output = evaluate(*arguments, "--tasks", "push_*", "lift_the_bocks")
    assert code == 1
    assert "Unknown task of --tasks 'lift_the_bocks'. Did you mean 'lift_the_box'?" in output


@pytest.mark.parametrize(
    ("name", "episodes", "steps", "settings"),
    [
        ("mail", 20, 600, {"image_size": 128, "orientation": "raw"}),
        ("libero", 20, 600, {"image_size": 128, "orientation": "raw"}),
        ("openvla", 50, 280, {"image_size": 256, "orientation": "rot180"}),
    ],
)
def test_published_protocols_of_libero(load_script, name, episodes, steps, settings):
    assert PROTOCOLS[name].episodes == episodes
    module = load_script("evaluate")
    recorded = World(
        "milk",
        "mail_envs:libero_object/pick_up_the_milk_and_place_it_in_the_basket",
        {"cameras": ["agentview"], "orientation": "upright", "image_size": 64},
        77,
    )
    world = module.following(module.Args("a", protocol=name), recorded)
    assert (world.task, world.env_id, world.max_steps) == ("milk", recorded.env_id, steps)
    assert world.kwargs["cameras"] == ["agentview"]
    assert settings.items() <= world.kwargs.items()
    assert world.kwargs["protocol"] == name
    assert world.kwargs["initial"] == "stored"
    with pytest.raises(InvalidInputError, match="leave out --max-steps"):
        module.following(module.Args("a", protocol=name, max_steps=3), recorded)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--agent", "random", "--env", ENV_ID, "--protocol", "mail"),
            ["--protocol mail is for LIBERO", "toybox"],
        ),
        (("--agent", "random", "--env", ENV_ID, "--workers", 0), ["--workers starts at 1"]),
        (("--agent", "random"), ["--env ID"]),
        (("--agent", "mail/ed-ma-bc", "--env", ENV_ID), ["must be trained first", "train.py"]),
        (("--agent", "mean-action", "--env", ENV_ID), ["statistics"]),
        (("--agent", "radnom", "--env", ENV_ID), ["Did you mean 'random'"]),
        (("--agent", "gone.safetensors"), ["gone.safetensors does not exist"]),
        (("--agent", "random", "--env", "toybox:toybox/Pont-v0"), ["Pont"]),
        (("--agent", "{artifact}", "--env", ENV_ID, "--env-kwargs", "size", "3"), ["(6,)", "(4,)"]),
        (("--agent", "{artifact}", "--videos", 1), ["--output"]),
        (("--agent", "{artifact}", "--episodes", 0), ["episode"]),
    ],
)
def test_mistakes_are_explained_without_a_traceback(evaluate, artifact, arguments, words):
    code, output = evaluate(*[str(a).format(artifact=artifact) for a in arguments])
    assert code == 1, output
    assert "error: " in output
    for word in words:
        assert word in output
    assert "Traceback" not in output


def test_a_pickle_is_refused(evaluate, tmp_path):
    import torch

    torch.save({"weights": torch.zeros(1)}, tmp_path / "model.pt")
    code, output = evaluate("--agent", tmp_path / "model.pt", "--env", ENV_ID)
    assert code == 1
    assert "could run code" in output


def test_help(evaluate):
    code, output = evaluate("--help")
    assert code == 0
    assert "Evaluate an agent" in output
    assert "--env-kwargs" in output
