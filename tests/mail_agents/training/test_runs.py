"""Run directories: arguments, metrics, locks."""

import dataclasses
import json
import multiprocessing
import os
from dataclasses import dataclass, field

import gymnasium
import pytest

from mail_agents.agents.mail_config import MailConfig
from mail_agents.config import AgentConfig
from mail_agents.errors import CorruptFileError, InvalidInputError, StorageError, UnknownNameError
from mail_agents.training.runs import (
    Run,
    RunArguments,
    ending_in_a_sentence,
    load_arguments,
    parse_arguments,
    read_metrics,
    refuse_torchrun,
    run_script,
)


@dataclass(frozen=True)
class Args(RunArguments):
    """A script."""

    agent: str = "mail/d-ma-bc"
    """Agent."""
    config: AgentConfig = field(default_factory=AgentConfig)
    """Its config."""
    names: tuple[str, ...] = ("a",)
    """A tuple, which JSON turns into a list."""
    limit: float | None = None
    """A union."""
    eval_episodes: int = 20
    """Episodes."""
    eval_seed: int = 0
    """Their seed."""
    target_returns: tuple[float, ...] = ()
    """Targets."""
    seed: int = 0
    """Seed."""
    steps: int = 10
    """Steps."""
    resume: str | None = None
    """Run to resume."""


@dataclass(frozen=True)
class RunsArgs(RunArguments):
    """A script with run directories."""

    agent: str = "mail/d-ma-bc"
    config: AgentConfig = field(default_factory=AgentConfig)


# ---- arguments -------------------------------------------------------------------------------


def test_the_agent_decides_which_config_flags_there_are():
    args = parse_arguments(Args, [])
    assert isinstance(args.config, MailConfig)
    assert args.config.encoder.layers == 0
    for argv in (["--agent", "mail/ed-ma-bc"], ["--agent=mail/ed-ma-bc"]):
        args = parse_arguments(Args, [*argv, "--config.history", "7", "--config.optim.lr", "0.1"])
        assert args.agent == "mail/ed-ma-bc"
        assert (args.config.history, args.config.optim.lr) == (7, 0.1)
        assert args.config.encoder.layers == 8  # the preset's, not the class's
    args = parse_arguments(Args, ["--config.history", "3", "--agent", "mean-action"])
    assert args.config.history == 3
    assert not isinstance(args.config, MailConfig)


def test_of_a_flag_given_twice_the_last_one_counts():
    args = parse_arguments(Args, ["--agent", "mean-action", "--agent", "mail/ed-ma-bc"])
    assert args.agent == "mail/ed-ma-bc"
    assert args.config.encoder.layers == 8
    args = parse_arguments(Args, ["--agent=mail/ed-ma-bc", "--agent", "mean-action"])
    assert not isinstance(args.config, MailConfig)


def test_unknown_agents_and_flags(capsys):
    with pytest.raises(UnknownNameError, match="Did you mean 'mail/d-ma-bc'"):
        parse_arguments(Args, ["--agent", "mail/d-ma-bcc"])
    with pytest.raises(SystemExit):
        parse_arguments(Args, ["--config.histroy", "3"])
    assert "--config.history" in capsys.readouterr().err


def start(directory, **changes):
    args = dataclasses.replace(
        Args(config=MailConfig(history=2), names=("x", "y"), limit=0.5), **changes
    )
    Run(directory, args, None).close()
    return args


def test_resuming_takes_every_argument_from_the_run(tmp_path):
    args = start(tmp_path / "run", seed=4)
    resumed = parse_arguments(Args, ["--resume", str(tmp_path / "run")])
    assert resumed == dataclasses.replace(args, resume=str(tmp_path / "run"))
    assert isinstance(resumed.names, tuple)
    longer = parse_arguments(Args, ["--resume", str(tmp_path / "run"), "--steps", "99"])
    assert longer.steps == 99


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", "5"),
        ("--agent", "mail/ed-tr-bc"),
        ("--config.width", "16"),
        ("--eval-episodes", "0"),
        ("--eval-seed", "1"),
        ("--target-returns", "3600"),
    ],
)
def test_resuming_cannot_change_what_decides_the_weights_and_scores(tmp_path, flags):
    start(tmp_path)
    with pytest.raises(InvalidInputError, match=r"was started with .*Drop the flag"):
        parse_arguments(Args, ["--resume", str(tmp_path), *flags])
    same = ("--seed", "0", "--config.history", "2")
    assert parse_arguments(Args, ["--resume", str(tmp_path), *same]).seed == 0


def test_what_differs_is_named_field_by_field(tmp_path):
    start(tmp_path, seed=4)
    flags = ("--config.history", "3", "--config.optim.lr", "0.1", "--seed", "5")
    with pytest.raises(InvalidInputError) as caught:
        parse_arguments(Args, ["--resume", str(tmp_path), *flags])
    changes = "config.history=2, not 3; config.optim.lr=0.0005, not 0.1; seed=4, not 5. A resumed"
    assert f"started with {changes}" in str(caught.value)
    assert "MailConfig" not in str(caught.value)


@dataclass(frozen=True)
class OtherArgs(Args):
    """Another script."""

    epochs: int = 3
    """A length of its own."""


def test_a_run_of_another_script_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scripts/train_mail.py"])
    Run(tmp_path, OtherArgs(config=MailConfig()), None).close()
    with pytest.raises(CorruptFileError, match="missing or unreadable"):
        load_arguments(Args, tmp_path)  # under the same name: the file does not fit
    monkeypatch.setattr("sys.argv", ["scripts/train.py"])
    with pytest.raises(
        InvalidInputError, match=r"with train_mail\.py.*scripts/train_mail\.py --re"
    ):
        load_arguments(Args, tmp_path)
    # The name alone forbids nothing: a copy of the script goes on.
    monkeypatch.setattr("sys.argv", ["mine/train_copy.py"])
    assert load_arguments(OtherArgs, tmp_path).epochs == 3


# ---- the end of a script ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInputError("no such thing"), "error: no such thing"),
        (gymnasium.error.NameNotFound("no such world"), "error: no such world"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_scripts_end_with_a_sentence(error, code, monkeypatch, capsys):
    def main(args):
        raise error

    monkeypatch.setattr("sys.argv", ["scripts/train.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(main, RunsArgs)
    assert caught.value.code == code
    if code == 130:
        assert capsys.readouterr().err == "Interrupted before anything was written.\n"


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def main(args):
        Run(args.run_dir, args, None).close()
        raise KeyboardInterrupt

    run = tmp_path / "my run"
    monkeypatch.setattr("sys.argv", ["scripts/train.py", "--output", str(run)])
    with pytest.raises(SystemExit) as caught:
        run_script(main, RunsArgs)
    assert caught.value.code == 130
    expected = f"Interrupted. Continue with: python scripts/train.py --resume '{run}'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{}",
        "[]",
        '{"arguments": {"agent": "mail/d-ma-bc"}}',
        '{"arguments": {"agent": "mail/d-ma-bc", "config": {"widht": 3}}}',
        '{"arguments": {"agent": "mail/d-ma-bc", "config": {}, "unknown": 1}}',
        '{"arguments": {"agent": "mail/d-ma-bc", "config": {}, "steps": "many"}}',
        '{"arguments": {"agent": "no/such-agent", "config": {}}}',
    ],
)
def test_unreadable_arguments_name_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "arguments.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"Cannot resume .*arguments\.json"):
        load_arguments(Args, tmp_path)


# ---- metrics ---------------------------------------------------------------------------------


def test_metrics_are_appended_and_read_back(tmp_path):
    with Run(tmp_path / "new" / "run", Args(), None) as run:
        run.log(1, {"loss": 2.0})
        assert read_metrics(run.directory) == [{"step": 1, "loss": 2.0}]  # while it runs
        run.log(2, {"loss": 1.0, "lr": 0.1})
    assert read_metrics(tmp_path / "new" / "run")[1] == {"step": 2, "loss": 1.0, "lr": 0.1}
    stored = json.loads((tmp_path / "new" / "run" / "arguments.json").read_text())
    assert stored["arguments"]["names"] == ["a"]
    assert set(stored) == {"script", "arguments", "processes", "versions", "command"}
    assert list((tmp_path / "new" / "run" / "tensorboard").glob("events*"))
    assert read_metrics(tmp_path) == []


def test_a_half_written_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with Run(tmp_path, Args(), None) as run:
        for step in range(1, 6):
            run.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with Run(tmp_path, Args(), 3) as run:
        run.log(4, {"loss": 40.0})
    rows = [(row["step"], row["loss"]) for row in read_metrics(tmp_path)]
    assert rows == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_new_run_never_overwrites(tmp_path):
    start(tmp_path)
    before = (tmp_path / "arguments.json").read_bytes()
    with pytest.raises(InvalidInputError, match=r"already holds a run.*--resume"):
        Run(tmp_path, Args(seed=9), None)
    assert (tmp_path / "arguments.json").read_bytes() == before


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".arguments.json.77.tmp").write_text("half")
    start(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def hold(directory, ready, release):
    with Run(directory, Args(), None):
        ready.set()
        release.wait(30)


def test_only_one_process_writes_a_run(tmp_path):
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, release))
    process.start()
    try:
        assert ready.wait(30)
        with pytest.raises(InvalidInputError, match="Another process is working on the run"):
            Run(tmp_path, Args(), 0)
    finally:
        release.set()
        process.join()
    Run(tmp_path, Args(), 0).close()  # free as soon as the other has ended


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Cannot write .*file"):
        Run(tmp_path / "file" / "run", Args(), None)


# ---- numbers and processes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_envs": 0}, "--eval-envs starts at 1; got 0"),
        ({"eval_workers": 0}, "--eval-workers starts at 1; got 0"),
        ({"eval_episodes": -1}, r"--eval-episodes starts at 0 \(none\); got -1"),
        ({"seed": -3}, "--seed starts at 1; got -3"),
    ],
)
def test_numbers_that_are_too_small_are_named_by_their_flag(changes, words):
    RunsArgs(eval_envs=None, eval_episodes=0).check_counts()
    with pytest.raises(InvalidInputError, match=words):
        dataclasses.replace(RunsArgs(seed=1), **changes).check_counts("seed")


def test_a_flag_may_choose_the_defaults_of_others():
    class Deep(RunsArgs):
        @classmethod
        def recommended(cls, agent, flag):
            config = MailConfig(history=9) if flag("output") == "deep" else MailConfig()
            return cls(agent=agent, config=config)

    assert parse_arguments(Deep, []).config.history == 5
    assert parse_arguments(Deep, ["--output", "deep"]).config.history == 9
    flags = ["--output=deep", "--config.history", "2"]
    assert parse_arguments(Deep, flags).config.history == 2


@pytest.fixture
def torchrun(monkeypatch):
    """Sets what torchrun does for a process."""

    def start(size, rank=0):
        given = {"WORLD_SIZE": size, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))

    return start


def test_torchrun_is_refused_by_scripts_for_one_process(monkeypatch, torchrun):
    refuse_torchrun()
    monkeypatch.setattr("sys.argv", ["scripts/collect.py"])
    torchrun(1)
    refuse_torchrun()
    for rank, code in (("0", "error: collect.py works in one process, and torchrun"), ("1", 1)):
        torchrun(4, rank)
        with pytest.raises(SystemExit) as caught:
            refuse_torchrun()
        assert caught.value.code == code or str(caught.value.code).startswith(str(code))


def test_an_interrupted_team_goes_on_with_torchrun(tmp_path, monkeypatch, torchrun, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    torchrun(2)
    (tmp_path / "arguments.json").write_text("{}")

    def interrupted(speaks):
        with ending_in_a_sentence(lambda: speaks) as known:
            known.append(tmp_path)
            raise KeyboardInterrupt

    for speaks in (True, False):
        with pytest.raises(SystemExit) as caught:
            interrupted(speaks)
        assert caught.value.code == 130
        printed = capsys.readouterr().err
        assert ("torchrun --nproc-per-node 2 train.py --resume" in printed) == speaks
        assert bool(printed) == speaks
