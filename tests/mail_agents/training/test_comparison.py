"""What a comparison plans to run, and what it refuses before anything is trained."""

from dataclasses import replace

import pytest
from toybox.world import make_dataset

import mail_agents
from mail_agents.errors import InvalidInputError, UnknownNameError
from mail_agents.training.comparison import ComparisonArguments, check_datasets, flags, plan


def test_cells_are_agents_by_datasets_by_seeds():
    args = ComparisonArguments(
        agents=("mail/d-ma-bc,optim.lr=0.1", "mail/d-ma-bc,optim.lr=0.2", "random"),
        datasets=("a/x.v1", "a/x.v2"),
        seeds=(0, 1),
        common="history=2,language=hash,ema_decay=null",
        videos=2,
        output="out",
    )
    cells = plan(args)
    assert len(cells) == 3 * 2 * 2
    # Names with dots keep apart what lies beside the run directories.
    for ending in (".json", ".log"):
        assert len({cell.beside(ending) for cell in cells}) == len(cells)
    first, last = cells[0].command, cells[-1].command
    text = " ".join(first)
    assert "--config.history 2 --config.language hash --config.ema-decay None" in text
    assert "--config.optim.lr 0.1" in text
    assert "--videos 2" in text
    assert "--videos 0" in " ".join(cells[1].command)  # only for the first seed
    assert "--config" not in " ".join(last)  # common overrides are for agents that learn
    assert {cell.label for cell in cells} == set(args.agents)


def test_how_fast_evaluations_run_is_no_part_of_what_is_compared(tmp_path):
    """So that a comparison that ran out of memory continues with fewer processes."""
    artifact = tmp_path / "agent.safetensors"
    artifact.touch()
    options = {"agents": ("random",), "datasets": ("a",), "trained": (f"Own={artifact}",)}
    plain, fast = (
        plan(ComparisonArguments(**options, **speed))
        for speed in ({}, {"eval_workers": 3, "eval_envs": 6})
    )
    assert [cell.command for cell in plain] == [cell.command for cell in fast]
    # Resumed runs would remember; so every number is given.
    assert [cell.speed for cell in plain] == [("--eval-workers", "1"), ("--workers", "1")]
    assert [cell.speed for cell in fast] == [
        ("--eval-envs", "6", "--eval-workers", "3"),
        ("--n-envs", "6", "--workers", "3"),
    ]


def test_flags():
    assert flags(
        {"a_b": True, "c": False, "d": [1, 2], "e.f_g": "x", "e.on": True, "e.off": False}
    ) == [
        "--config.a-b",
        "--config.no-c",
        *("--config.d", "1", "2"),
        *("--config.e.f-g", "x"),
        "--config.e.on",
        "--config.e.no-off",
    ]


def test_flags_of_nested_switches_are_those_of_the_train_script(capsys):
    from mail_agents.training.runs import RunArguments, parse_arguments

    for value in (True, False):
        argv = ["--agent", "dt", *flags({"self_evolution.enabled": value})]
        config = parse_arguments(RunArguments, argv).config
        assert config.self_evolution.enabled is value


def test_an_agent_may_be_named():
    agents = ("Small=dt,d_model=64,layers=2", "dt", "Other=bc")
    cells = plan(ComparisonArguments(agents=agents, datasets=("a",)))
    assert [cell.label for cell in cells] == ["Small", "dt", "Other"]
    assert [cell.command[1] for cell in cells] == ["dt", "dt", "bc"]
    assert "--config.d-model 64 --config.layers 2" in " ".join(cells[0].command)


@pytest.mark.parametrize(
    ("agents", "datasets", "error", "words"),
    [
        (("mail/d-ma-cb",), ("a",), UnknownNameError, "Did you mean 'mail/d-ma-bc'"),
        (("mail/d-ma-bc,widht=3",), ("a",), UnknownNameError, "Did you mean 'width'"),
        (("mail/d-ma-bc,width",), ("a",), InvalidInputError, "field=value"),
        (("random",), ("a/x", "b/x"), InvalidInputError, "share a directory"),
        (("random", "random"), ("a",), InvalidInputError, "share a directory"),
    ],
)
def test_a_plan_that_cannot_work_trains_nothing(agents, datasets, error, words):
    with pytest.raises(error, match=words):
        plan(ComparisonArguments(agents=agents, datasets=datasets))


def test_target_returns_belong_to_datasets_and_to_agents_that_use_them():
    args = ComparisonArguments(
        agents=("dt", "bc"),
        datasets=("data/hopper", "data/walker"),
        target_returns=("hopper=3600", "hopper=1800", "walker=5000"),
    )
    commands = {(c.label, c.dataset): " ".join(c.command) for c in plan(args)}
    assert "--target-returns 3600 1800" in commands["dt", "data/hopper"]
    assert "--target-returns 5000" in commands["dt", "data/walker"]
    assert "--target-returns" not in commands["bc", "data/hopper"]
    everywhere = plan(ComparisonArguments(("dt",), ("a", "b"), target_returns=("9", "a=-1e3")))
    assert [" ".join(c.command).partition("--target-returns ")[2] for c in everywhere] == [
        "9 -1e3",
        "9",
    ]


def test_ready_made_agents_are_evaluated_where_they_belong(tmp_path):
    artifact = tmp_path / "sac@home.safetensors"
    artifact.touch()
    trained = (f"SAC={artifact}@hopper", f"Both={artifact}")
    args = ComparisonArguments(("random",), ("d/hopper", "d/walker"), seeds=(3, 4), trained=trained)
    cells = [cell for cell in plan(args) if cell.script == "evaluate.py"]
    assert [(c.label, c.dataset, c.seed) for c in cells] == [
        ("SAC", "d/hopper", 3),
        ("Both", "d/hopper", 3),
        ("Both", "d/walker", 3),
    ]
    assert f"--agent {artifact} --dataset d/hopper" in " ".join(cells[0].command)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_returns": ("many",)}, InvalidInputError, "NUMBER or DATASET=NUMBER"),
        ({"target_returns": ("hoper=3",)}, UnknownNameError, "Did you mean 'hopper'"),
        ({"target_returns": ("3",)}, InvalidInputError, "one on these datasets: random"),
        ({"trained": ("sac",)}, InvalidInputError, "LABEL=ARTIFACT"),
        ({"trained": ("SAC=gone.safetensors",)}, InvalidInputError, "gone.safetensors"),
        ({"trained": (f"SAC={__file__}@walker",)}, UnknownNameError, "walker"),
        ({"trained": (f"random={__file__}",)}, InvalidInputError, "label that no agent has"),
        ({"workers": 0}, InvalidInputError, "start at 1"),
        ({"eval_workers": 0}, InvalidInputError, "start at 1"),
        ({"eval_envs": 0}, InvalidInputError, "start at 1"),
    ],
)
def test_options_that_cannot_work_train_nothing(options, error, words):
    with pytest.raises(error, match=words):
        plan(ComparisonArguments(("random",), ("data/hopper",), **options))


def test_ready_made_agents_get_targets_where_they_use_them(tmp_path):
    """The kind of an artifact is read from it, without its weights."""
    dataset = make_dataset(tmp_path / "point")
    small = {"d_model": 8, "layers": 1, "history": 2, "max_timestep": 50}
    paths = {}
    for agent, config in (("dt", small), ("mean-action", {})):
        made = mail_agents.make(agent, dataset.features, config=config, device="cpu")
        made.fit_statistics(dataset)
        paths[agent] = made.save(tmp_path / agent / "agent.safetensors")
    trained = (f"Old={paths['dt'].parent}", f"Mean={paths['mean-action']}@a")
    args = ComparisonArguments(
        ("random",), ("d/a", "d/b"), trained=trained, target_returns=("a=9", "a=-3")
    )
    tails = {
        (cell.label, cell.dataset): " ".join(cell.command).partition("--target-returns ")[2]
        for cell in plan(args)
    }
    assert tails == {
        ("random", "d/a"): "",
        ("random", "d/b"): "",
        ("Old", "d/a"): "9 -3",
        ("Old", "d/b"): "",
        ("Mean", "d/a"): "",
    }
    elsewhere = (f"Old={paths['dt']}@b",)
    with pytest.raises(InvalidInputError, match="none of --agents and --trained is one"):
        plan(replace(args, trained=elsewhere))


def test_two_datasets_of_one_name_are_refused(tmp_path):
    """Results know the name alone: two would be averaged as if they were seeds of one."""
    for folder, name in (("a", "demo"), ("b", "demo"), ("c", "other")):
        make_dataset(tmp_path / folder, name=name)
    a, b, c = (str(tmp_path / folder) for folder in "abc")
    check_datasets([a, c])
    with pytest.raises(InvalidInputError, match="are both named 'demo'"):
        check_datasets([a, c, b])


@pytest.mark.parametrize("trained", [(), ("SAC=x.safetensors@walker", "Both=x.safetensors")])
def test_commands_of_finished_cells_do_not_change(tmp_path, monkeypatch, trained):
    """They are compared with those of earlier releases, to reuse what is done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.safetensors").touch()
    args = ComparisonArguments(
        ("DT=dt,history=5", "random"),
        ("d/hopper", "d/walker"),
        seeds=(3,),
        trained=trained,
        target_returns=() if trained else ("hopper=9",),
        device="cpu",
        output="out",
    )
    lines = [" ".join(cell.command) for cell in plan(args)]
    aims = "" if trained else " --target-returns 9"
    assert lines[0] == (
        "--agent dt --dataset d/hopper --seed 3 --steps 1000 --eval-episodes 20 --eval-every 0 "
        f"--eval-seed 0 --videos 0 --device cpu --output out/runs/DT-hopper-s3{aims} "
        "--config.history 5"
    )
    for line in lines[4:]:
        dataset = line.split()[3]
        label = "SAC" if line == lines[4] else "Both"
        name = dataset.removeprefix("d/")
        assert line == (
            f"--agent x.safetensors --dataset {dataset} --episodes 20 --seed 0 --videos 0 "
            f"--device cpu --output out/runs/{label}-{name}-trained"
        )
    assert len(lines) == 4 + 3 * bool(trained)
