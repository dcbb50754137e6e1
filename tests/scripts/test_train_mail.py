"""scripts/train_mail.py at toy size: the paper's recipe, epoch by epoch."""

import inspect
import json
import os
import re
import shutil
from types import SimpleNamespace

import gymnasium
import pytest
import torch
from toybox.world import ENV_ID, demonstrations

import mail_agents
from mail_agents.data.store import write_dataset
from mail_agents.errors import InvalidInputError
from mail_agents.features import Feature, FeatureSpec
from mail_agents.report.results import load_results
from mail_agents.training.runs import parse_arguments, read_metrics
from mail_envs.libero import LiberoEnv
from mail_envs.libero_protocols import PROTOCOLS
from mail_wrappers.datasets.libero_names import tasks_of

TINY = (
    *("--agent", "mail/d-ma-ddpm", "--config.decoder.layers", 1, "--config.decoder.d-state", 2),
    *("--config.width", 8, "--config.feature-width", 8, "--config.history", 2),
    *("--config.horizon", 2, "--config.optim.batch-size", 8, "--device", "cpu"),
    *("--demos", 2, "--epochs", 3, "--eval-epochs", 1, "--eval-episodes", 2),
)


@pytest.fixture
def train(scripts, tmp_path):
    def run(*arguments, **options):
        return scripts.run(tmp_path, "train_mail", *arguments, **options)

    return run


def test_a_run_from_end_to_end_and_again_from_a_checkpoint(train, tmp_path, point_dataset):
    code, output = train(*TINY, "--dataset", point_dataset, "--output", "run")
    assert code == 0, output
    dataset = mail_agents.open_dataset(point_dataset)
    assert f"{2 * len(dataset.info.tasks)} demonstrations" in output
    assert "suite score" in output
    run = tmp_path / "run"
    rows = read_metrics(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    (result,) = load_results(run / "result.json")
    assert set(result.evaluations) == {"last", "best"}
    assert result.train_steps == rows[-1]["step"]
    agent = mail_agents.load(run / "agent.safetensors")
    assert agent.updates == rows[-1]["step"]
    assert agent.ema is not None

    artifact, metrics = (
        (run / "agent.safetensors").read_bytes(),
        (run / "metrics.jsonl").read_text(),
    )
    (run / "agent.safetensors").unlink()
    last = run / "checkpoints" / "last"
    assert last.read_text().strip() == f"step-{rows[2]['step']:08d}"
    last.write_text(f"step-{rows[1]['step']:08d}\n")
    code, output = train("--resume", "run")
    assert code == 0, output
    assert (run / "agent.safetensors").read_bytes() == artifact
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == [
        row["step"] for row in read_metrics(run)
    ]


def test_demos_are_chosen_per_task(load_script, point_dataset):
    script = load_script("train_mail")
    dataset = mail_agents.open_dataset(point_dataset)
    args = script.Args(dataset=str(point_dataset), demos=1)
    chosen = script.select_episodes(dataset, args)
    assert sorted(dataset.task_ids[chosen]) == list(range(len(dataset.info.tasks)))
    everything = script.select_episodes(dataset, script.Args(demos=None))
    assert everything == list(range(len(dataset)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--agent", "random"), "is no MaIL agent; train it with scripts/train.py"),
        ((*TINY, "--demos", 99), "--demos asks for 99"),
        ((*TINY, "--dataset", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(train, point_dataset, arguments, words):
    if "--dataset" not in arguments:
        arguments = (*arguments, "--dataset", point_dataset)
    code, output = train(*arguments)
    assert code == 1
    assert words in output
    assert "Traceback" not in output


# ---- suites ----------------------------------------------------------------------------------

MILK, SOUP = (f"pick_up_the_{x}_and_place_it_in_the_basket" for x in ("milk", "tomato_sauce"))
SHRUNK = (
    *("--config.decoder.layers", 1, "--config.width", 8, "--config.feature-width", 8),
    *("--demos", 1, "--epochs", 1, "--eval-episodes", 0, "--device", "cpu"),
)


@pytest.fixture(scope="module")
def baskets(tmp_path_factory):
    """Two tasks that have the names of LIBERO's, in a world that needs no simulator."""
    path = tmp_path_factory.mktemp("data") / "baskets"
    episodes = [*demonstrations(2, MILK), *demonstrations(2, SOUP)]
    specs = {task: {"id": ENV_ID, "kwargs": {}} for task in (MILK, SOUP)}
    env = gymnasium.make(ENV_ID)
    features = FeatureSpec.from_spaces(env.observation_space, env.action_space)
    return write_dataset(path, episodes, name="baskets", env_specs=specs, features=features).path


def test_a_suite_chooses_the_settings_and_flags_beside_it_win(train, tmp_path, baskets):
    code, output = train(
        *("--suite", "libero_object", "--agent", "mail/ed-ma-bc", "--dataset", baskets),
        *(*SHRUNK, "--config.encoder.layers", 1, "--config.horizon", 3, "--output", "run"),
    )
    assert code == 0, output
    assert "note: The dataset has 2 of the 10 tasks of libero_object." in output
    assert "note: The paper's agent sees agentview_rgb and eye_in_hand_rgb; this one" in output
    stored = json.loads((tmp_path / "run" / "arguments.json").read_text())["arguments"]
    assert stored["suite"] == "libero_object"
    config = stored["config"]
    assert (config["history"], config["horizon"]) == (5, 3)
    assert config["decoder"]["layers"] == 1
    assert (config["decoder"]["d_state"], config["encoder"]["d_conv"]) == (8, 2)
    code, output = train("--resume", "run", "--suite", "libero_spatial")
    assert code == 1
    assert "suite=libero_object, not libero_spatial" in output


def test_of_two_suites_the_last_one_counts(load_script):
    script = load_script("train_mail")
    args = parse_arguments(script.Args, ["--suite", "libero_object", "--suite", "libero_10"])
    assert (args.suite, args.config.horizon) == ("libero_10", 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--suite", "libero_spatial"), [f"'{MILK}' is not (2 of 2)", "drop --suite"]),
        (("--suite", "libero_object", "--agent", "mail/ed-ma-ddpm-so"), ["none of them. Use mail"]),
        (
            ("--suite", "libero_object", "--config.language", "no/such-model", *SHRUNK),
            ["no/such-model", "language='hash' needs no model"],
        ),
    ],
)
def test_mistakes_with_suites_are_explained(train, baskets, arguments, words):
    code, output = train(*arguments, "--dataset", baskets)
    assert code == 1, output
    for word in words:
        assert word in output
    assert "Traceback" not in output


def test_the_papers_agent_sees_two_cameras(load_script):
    script = load_script("train_mail")
    image, state = Feature("image", (8, 8, 3), "uint8"), Feature("state", (7,), "float32")
    keys = {"agentview_rgb": image, "eye_in_hand_rgb": image, "joint_states": state}

    def chosen(keys=keys, **settings):
        dataset = SimpleNamespace(features=FeatureSpec(keys, state))
        args = script.Args(**{"suite": "libero_object", **settings})
        return script.paper_observations(args, dataset).observations

    assert chosen() == ("agentview_rgb", "eye_in_hand_rgb")
    assert chosen(suite=None) == ()
    assert chosen(observations=("joint_states",)) == ("joint_states",)
    assert chosen(keys={"joint_states": state}) == ()


def test_where_a_run_differs_from_the_papers_is_said(load_script):
    script = load_script("train_mail")
    world = {"id": f"mail_envs:libero_object/{MILK}", "kwargs": {"image_size": 128}}

    def notes(seen=script.CAMERAS, episodes=20, **changes):
        spec = {**world, **changes}
        info = SimpleNamespace(tasks=tasks_of("libero_object"), env_specs={MILK: spec, SOUP: spec})
        args = script.Args(suite="libero_object", eval_episodes=episodes)
        return script.suite_notes(args, SimpleNamespace(info=info), seen)

    assert notes() == notes(max_episode_steps=600) == []
    assert notes(seen=["joint_states"]) == [
        "The paper's agent sees agentview_rgb and eye_in_hand_rgb; this one sees joint_states."
    ]
    changed = {"kwargs": {"protocol": "openvla"}, "max_episode_steps": 220}
    assert notes(**changed) == [
        "The evaluation is not the paper's protocol: protocol is 'openvla', not 'mail'; "
        "episodes end after 220 steps, not 600."
    ]
    assert notes(episodes=0, **changed) == []
    assert "is no world of libero_object" in notes(id="toybox:point")[0]


def test_worlds_follow_the_papers_protocol_unless_told_otherwise():
    parameters = inspect.signature(LiberoEnv).parameters
    for name, value in PROTOCOLS["mail"].env_kwargs.items():
        assert parameters[name].default == value


def test_goal_is_told_its_task(load_script):
    script = load_script("train_mail")
    args = parse_arguments(script.Args, ["--suite", "libero_goal"])
    assert (args.suite, args.config.language) == ("libero_goal", "openai/clip-vit-base-patch32")
    assert args.config.encoder.layers == args.config.decoder.layers == 10
    argv = ["--suite=libero_goal", "--config.language", "hash", "--config.history=1"]
    args = parse_arguments(script.Args, argv)
    assert (args.config.language, args.config.history) == ("hash", 1)
    assert args.config.encoder.layers == 10


def test_a_whole_suite_needs_no_note(load_script):
    script = load_script("train_mail")
    assert script.check_suite(tasks_of("libero_90"), "libero_90") is None
    with pytest.raises(InvalidInputError, match="has none"):
        script.check_suite([], "libero_90")


# ---- arithmetic ------------------------------------------------------------------------------


def test_bfloat16_trains_evaluates_and_resumes_exactly(train, tmp_path, point_dataset):
    code, output = train(
        *TINY, "--dataset", point_dataset, "--output", "a", "--precision", "bfloat16"
    )
    assert code == 0, output
    code, output = train(*TINY, "--dataset", point_dataset, "--output", "b")
    assert code == 0, output
    losses = {name: [row["loss"] for row in read_metrics(tmp_path / name)] for name in "ab"}
    assert losses["a"] != losses["b"]
    assert losses["a"] == pytest.approx(losses["b"], rel=0.05)
    agent = mail_agents.load(tmp_path / "a" / "agent.safetensors")
    assert {p.dtype for p in agent.policy.parameters()} == {torch.float32}

    run = tmp_path / "a"
    artifact = (run / "agent.safetensors").read_bytes()
    (run / "checkpoints" / "last").write_text(f"step-{read_metrics(run)[1]['step']:08d}\n")
    code, output = train("--resume", "a")
    assert code == 0, output
    assert (run / "agent.safetensors").read_bytes() == artifact


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler (g++ or clang++) on the CPU",
)
def test_a_compiled_policy_trains_evaluates_and_resumes_exactly(train, tmp_path, point_dataset):
    small = ("--agent", "mail/d-tr-bc", "--config.decoder.layers", 1, "--config.width", 8)
    small = (*small, *TINY[6:], "--dataset", point_dataset)
    code, output = train(*small, "--output", "plain")
    assert code == 0, output
    code, output = train(*small, "--output", "compiled", "--compile")
    assert code == 0, output
    losses = {
        name: [row["loss"] for row in read_metrics(tmp_path / name)]
        for name in ("plain", "compiled")
    }
    assert len(losses["plain"]) == 3
    # Compiled code draws random numbers of its own for dropout.
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=0.3)
    (result,) = load_results(tmp_path / "compiled" / "result.json")
    assert result.evaluations["last"][0].n == 2

    run = tmp_path / "compiled"
    artifact = (run / "agent.safetensors").read_bytes()
    (run / "checkpoints" / "last").write_text(f"step-{read_metrics(run)[1]['step']:08d}\n")
    code, output = train("--resume", "compiled")
    assert code == 0, output
    assert (run / "agent.safetensors").read_bytes() == artifact


def test_a_run_ends_with_a_table_of_its_tasks(train, baskets):
    code, output = train(
        *("--suite", "libero_object", "--agent", "mail/d-ma-bc", "--dataset", baskets),
        *(*SHRUNK, "--eval-episodes", 2, "--config.decoder.d-state", 2),
    )
    assert code == 0, output
    table = output[output.index("score, 95 % interval") :]
    for task in (MILK, SOUP, "all tasks"):
        line = next(line for line in table.splitlines() if line.strip().endswith(task))
        assert re.search(r"\d+ % \[\d+, \d+\] +\d of [24] ", line)
    assert "suite score" in table
