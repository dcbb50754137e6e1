"""Run directories: arguments, metrics (JSONL and TensorBoard) and progress, resumable."""

import dataclasses
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeVar

import dacite
import gymnasium
import tyro

from mail_agents import __version__
from mail_agents.config import AgentConfig
from mail_agents.data.files import take_lock
from mail_agents.errors import CorruptFileError, InvalidInputError, MailAgentsError
from mail_agents.registry import spec
from mail_agents.storage import storing, write_atomic

ARGUMENTS = "arguments.json"
METRICS = "metrics.jsonl"
#: Arguments that decide the weights of a run or how it is scored: resuming cannot change them.
_DECIDING = (
    *("agent", "config", "seed", "validation", "precision", "updates"),
    *("observations", "suite", "demos", "demo_selection", "output"),
    *("eval_episodes", "eval_seed", "target_returns"),
)

#: Numbers that torchrun tells the processes it starts.
_TORCHRUN = ("WORLD_SIZE", "RANK", "MASTER_PORT")


@dataclass(frozen=True)
class RunArguments:
    """The arguments that every train script has."""

    agent: str
    """Registered id; see 'mail-agents list'."""
    config: AgentConfig
    """The agent's own settings; --agent decides which there are."""
    dataset: str = "data/demo"
    """Dataset directory, made by a scripts/collect*.py or by 'mail-agents data convert'."""
    observations: tuple[str, ...] = ()
    """Observation keys the agent sees, for example camera names; none named means all."""
    output: str | None = None
    """Run directory; None makes runs/<agent>-s<seed>."""
    seed: int = 0
    """Seeds initial weights, batch order and training noise."""
    eval_episodes: int = 20
    """Episodes per task; 0 for no evaluation."""
    eval_seed: int = 0
    """Seeds the evaluation episodes; the same for every training seed, so runs are paired."""
    eval_envs: int | None = None
    """Environments stepped side by side; None takes what the environment suggests, else 20."""
    eval_workers: int = 1
    """Processes that host the environments."""
    videos: int = 0
    """Successful and failed episodes to record per task at the end."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass (bfloat16 by autocast)."""
    compile: bool = False
    """Compile the policy's training pass; on a GPU, record acting as CUDA graphs."""
    resume: str | None = None
    """Run directory to continue; all other settings are taken from it."""

    @property
    def run_dir(self) -> Path:
        """Where this run lives."""
        if self.resume is not None:
            return Path(self.resume)
        return Path(self.output or f"runs/{self.agent.replace('/', '-')}-s{self.seed}")

    @classmethod
    def recommended(cls, agent: str, flag: Callable[[str], str | None]) -> Self:
        """Arguments for an agent, before any flag is applied.

        Args:
            agent: Registered id.
            flag: Gives the text of a flag, by its name without dashes, or None: for scripts whose
                flags choose the defaults of others.

        Raises:
            UnknownNameError: The agent does not exist.
        """
        return cls(agent=agent, config=spec(agent).config())

    def check_counts(self, *names: str) -> None:
        """Refuses numbers that are too small, by the flag that gave them.

        Args:
            names: Further fields that start at 1, those of one script.

        Raises:
            InvalidInputError: A number is too small.
        """
        smallest = dict.fromkeys((*names, "eval_envs", "eval_workers"), 1)
        for name in ("eval_episodes", "eval_every", "videos"):
            smallest.setdefault(name, 0)
        for name, bound in smallest.items():
            value = getattr(self, name, None)
            if value is not None and value < bound:
                meaning = "" if bound else " (none)"
                raise InvalidInputError(
                    f"--{name.replace('_', '-')} starts at {bound}{meaning}; got {value}."
                )


A = TypeVar("A", bound=RunArguments)


def parse_arguments(cls: type[A], argv: Sequence[str] | None = None) -> A:
    """Parses a train script's arguments, with the chosen agent's own config behind ``--config``.

    ``cls`` gives ``agent`` a default. ``--agent ID`` decides which config flags exist and their
    defaults; ``--resume RUN`` takes every default from that run's stored arguments; what decides
    the weights, or how they are scored, cannot be changed then.

    Args:
        cls: The dataclass.
        argv: Arguments without the program name; None takes ``sys.argv``.

    Raises:
        UnknownNameError: The agent id does not exist.
        CorruptFileError: The run to resume has no readable arguments.
        InvalidInputError: A flag beside ``--resume`` would make it another run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    resume = _flag(argv, "resume")
    if resume is not None:
        default = load_arguments(cls, Path(resume))
        default = dataclasses.replace(default, resume=resume)
    else:
        agent = _flag(argv, "agent") or _field_default(cls, "agent")
        default = cls.recommended(agent, partial(_flag, argv))
    # The flags of ``config`` are those of the default's own class: tyro narrows to it.
    arguments = tyro.cli(cls, args=argv, default=default)
    if resume is not None:
        lengths = ("steps", "epochs", "iterations", "stages")
        bent = lengths if default.config.optim.schedule == "cosine" else ()
        changes: list[str] = []
        for name in (*_DECIDING, *bent):
            given, stored = getattr(arguments, name, None), getattr(default, name, None)
            changes += _differences(name, stored, given)
        if changes:
            raise InvalidInputError(
                f"{resume} was started with {'; '.join(changes)}. A resumed run keeps what decides "
                "its weights and its scores. Drop the flag, or start a new run with another "
                "--output."
            )
    return arguments


def _differences(name: str, stored: Any, given: Any) -> list[str]:
    """Names what differs, field by field where both are configs of one class."""
    if stored == given:
        return []
    if not dataclasses.is_dataclass(stored) or type(stored) is not type(given):
        return [f"{name}={stored}, not {given}"]
    return [
        line
        for each in dataclasses.fields(stored)
        for line in _differences(
            f"{name}.{each.name}", getattr(stored, each.name), getattr(given, each.name)
        )
    ]


def started_processes() -> int:
    """Number of processes that torchrun started for this training; 1 without it.

    Raises:
        InvalidInputError: Only a part of what torchrun sets is set.
    """
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):
        return 1
    found = {name: os.environ.get(name, "") for name in _TORCHRUN}
    wrong = [f"{name}={text}" for name, text in found.items() if not text.isdecimal()]
    if not wrong and int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        wrong = [f"RANK={found['RANK']}"]
    if not os.environ.get("MASTER_ADDR"):
        wrong.append("MASTER_ADDR=")
    if wrong:
        raise InvalidInputError(
            f"WORLD_SIZE={found['WORLD_SIZE']} asks for training in several processes, for which "
            f"{', '.join(wrong)} cannot be used. Unset WORLD_SIZE to train in one process, or "
            "start the script with torchrun, which sets everything it takes."
        )
    return int(found["WORLD_SIZE"])


def run_script(main: Callable[[A], None], cls: type[A]) -> None:
    """Runs a train script from its command line, and ends with a sentence where it cannot go on.

    Args:
        main: The script, given its arguments. It trains in one process; for several see
            :func:`mail_agents.training.distributed.run_team_script`.
        cls: See :func:`parse_arguments`.

    Raises:
        SystemExit: With the sentence, or with status 130 after Ctrl-C.
    """
    with ending_in_a_sentence() as known:
        refuse_torchrun()
        arguments = parse_arguments(cls)
        known.append(arguments.run_dir)
        main(arguments)


def refuse_torchrun() -> None:
    """Ends a script that works in one process when torchrun started more.

    Raises:
        SystemExit: With a sentence in the first process, silently in the others.
    """
    if started_processes() == 1:
        return
    text = (
        f"error: {_script()} works in one process, and torchrun started {started_processes()}, "
        "which would overwrite each other's results. Start it with python. (train.py and "
        "train_mail.py train in several processes.)"
    )
    sys.exit(text if os.environ.get("RANK", "0") == "0" else 1)


@contextmanager
def ending_in_a_sentence(speaks: Callable[[], bool] = lambda: True) -> Iterator[list[Path]]:
    """Ends the program without a traceback where the reason is known.

    Args:
        speaks: Asked when it fails: whether this process is the one to say why.

    Yields:
        A list for the run directory, as soon as it is known.

    Raises:
        SystemExit: With the sentence, with status 130 after Ctrl-C, or silently.
    """
    known: list[Path] = []
    try:
        yield known
    except (MailAgentsError, gymnasium.error.Error) as error:
        sys.exit(f"error: {error}" if speaks() else 1)
    except KeyboardInterrupt:
        if speaks():
            print(_interrupted(known), file=sys.stderr)
        sys.exit(130)
    except Exception:
        if speaks():
            raise
        sys.exit(1)


def _interrupted(known: Sequence[Path]) -> str:
    if not known or not (known[0] / ARGUMENTS).exists():
        return "Interrupted before anything was written."
    command = shlex.join([*_starter(), sys.argv[0], "--resume", str(known[0])])
    return f"Interrupted. Continue with: {command}"


def _starter() -> list[str]:
    if started_processes() == 1:
        return ["python"]
    here = os.environ.get("LOCAL_WORLD_SIZE", str(started_processes()))
    return ["torchrun", "--nproc-per-node", here]


def _flag(argv: Sequence[str], name: str) -> str | None:
    found = None  # the last one counts, as for the parser
    for i, token in enumerate(argv):
        if token == f"--{name}" and i + 1 < len(argv):
            found = argv[i + 1]
        elif token.startswith(f"--{name}="):
            found = token.partition("=")[2]
    return found


def _field_default(cls: type, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(cls) if f.name == name)


def load_arguments(cls: type[A], run: Path) -> A:
    """Reads the arguments a run was started with.

    Raises:
        CorruptFileError: They are missing or do not fit ``cls``.
        InvalidInputError: They are those of another script, or of another number of processes.
    """
    path = run / ARGUMENTS
    script = None
    try:
        stored = json.loads(path.read_text("utf-8"))
        data, script = stored["arguments"], stored.get("script")
        processes = int(stored.get("processes", started_processes()))
        config_class = type(spec(data["agent"]).config())
        config = config_class.from_dict(data.pop("config"))
        plain = dacite.Config(strict=True, cast=[tuple], type_hooks={AgentConfig: lambda _: config})
        arguments = dacite.from_dict(cls, {**data, "config": {}}, plain)
    except (OSError, ValueError, KeyError, TypeError, dacite.DaciteError) as error:
        if script is not None and script != _script():
            raise InvalidInputError(
                f"{run} was started with {script}, whose arguments {_script()} does not have; "
                f"continue with scripts/{script} --resume {run}"
            ) from error
        raise CorruptFileError(
            f"Cannot resume {run}: {path} is missing or unreadable ({error}). Expected a run "
            "directory written by this script."
        ) from error
    if processes != started_processes():
        starter = "torchrun --nproc-per-node N, N processes in all" if processes > 1 else "python"
        raise InvalidInputError(
            f"{run} was started in {processes} process(es), not {started_processes()}. Batches and "
            f"noise depend on their number; continue with as many ({starter})."
        )
    return arguments


def _script() -> str:
    return Path(sys.argv[0]).name


class Run:
    """One run directory and its metrics.

    ``metrics.jsonl`` holds one JSON object per logged step; a resumed run drops lines past its
    checkpoint, so the file never holds a step twice.

    Args:
        directory: Where everything goes.
        arguments: The script's frozen arguments, stored as ``arguments.json``.
        resume_step: None for a new run; else the step of the checkpoint it continues from.

    Raises:
        InvalidInputError: A new run would overwrite an existing one, or another process is writing
            this one.
        StorageError: The disk is full or cannot be written to.
    """

    def __init__(self, directory: str | Path, arguments: Any, resume_step: int | None) -> None:
        self.directory = Path(directory)
        self._metrics = self.directory / METRICS
        with storing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            for leftover in self.directory.glob(".*.tmp"):  # of a process killed while it wrote
                leftover.unlink()
            if resume_step is None:
                self._start(arguments)
            else:
                self._truncate(resume_step)
        except BaseException:
            self._lock.close()
            raise
        self._file = open(self._metrics, "a", encoding="utf-8")  # noqa: SIM115 - open for the run
        # Imported here: it takes torch, which a comparison does not need to plan or read.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(
            str(self.directory / "tensorboard"),
            purge_step=None if resume_step is None else resume_step + 1,
        )

    def _take_lock(self) -> BinaryIO:
        try:
            return take_lock(self.directory / ".lock")
        except InvalidInputError as error:
            raise InvalidInputError(
                f"Another process is working on the run {self.directory}. Wait for it to end, or "
                "end it, then use --resume."
            ) from error

    def _start(self, arguments: Any) -> None:
        if (self.directory / ARGUMENTS).exists():
            raise InvalidInputError(
                f"{self.directory} already holds a run. Continue it: --resume {self.directory}, "
                "or choose another --output."
            )
        text = {
            "script": _script(),
            "arguments": dataclasses.asdict(arguments),
            "processes": started_processes(),
            "versions": {"mail_agents": __version__, "python": platform.python_version()},
            "command": " ".join([*_starter(), *sys.argv]),
        }
        write_atomic(self.directory / ARGUMENTS, (json.dumps(text, indent=2) + "\n").encode())

    def _truncate(self, step: int) -> None:
        kept = [row for row in read_metrics(self.directory) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomic(self._metrics, text.encode())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends scalars under a step to JSONL and TensorBoard.

        Raises:
            StorageError: The disk is full.
        """
        with storing(self._metrics):
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes everything to disk."""
        with storing(self._metrics), self._lock:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._board.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Reads a run's metrics; a half-written last line (a killed run) is left out."""
    path = Path(run) / METRICS
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
