"""Planning a comparison: which agents are trained on which datasets with which seeds, and where.

``scripts/compare.py`` runs what is planned here. Planning imports no torch, so that mistakes in the
arguments are found at once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mail_agents.config import parse_agent
from mail_agents.data.store import open_dataset
from mail_agents.errors import InvalidInputError, unknown_name
from mail_agents.registry import load_entry_point, spec
from mail_agents.report.results import RunResult, load_results
from mail_agents.storage import write_atomic
from mail_agents.suite import worlds_of


@dataclass(frozen=True)
class ComparisonArguments:
    """Compare agents on datasets over seeds."""

    agents: tuple[str, ...]
    """Registered ids, each optionally followed by ',field=value' overrides and preceded by 'NAME='
    for the report."""
    datasets: tuple[str, ...]
    """Dataset directories; one policy is trained on all tasks of a dataset."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    trained: tuple[str, ...] = ()
    """Further rows that exist already, LABEL=ARTIFACT, evaluated like the others; append @DATASET
    (the name of its directory) to leave out the other datasets."""
    common: str = ""
    """Overrides for every agent that learns, for example 'history=1,language=hash'."""
    steps: int = 1000
    """Optimiser updates per run."""
    eval_episodes: int = 20
    """Evaluation episodes per task and run, the same initial states for all."""
    eval_every: int = 0
    """Also evaluate every so many updates, and report the best besides the last."""
    eval_seed: int = 0
    """Seeds the evaluation episodes."""
    eval_envs: int | None = None
    """Environments that each run steps side by side; None takes what they suggest, else 20."""
    eval_workers: int = 1
    """Processes that host the environments of each run."""
    target_returns: tuple[str, ...] = ()
    """Returns that return-conditioned agents aim for (those of --trained, too), the headline's
    first: 3600 1800, or by dataset: hopper-medium=3600 hopper-medium=1800. None named means each
    agent's own choice."""
    videos: int = 0
    """Successful and failed episodes to record per agent and task, for the first seed."""
    workers: int = 2
    """Runs at a time."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    output: str = "runs/comparison"
    """Directory for runs, charts and report."""
    title: str = "Agent comparison"
    """Heading of the report."""
    notes: tuple[str, ...] = ()
    """Sentences to print under the heading, for what a reader must know."""
    published: Literal["auto", "none"] = "auto"
    """'auto' adds a section with published scores on datasets of the same names."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        label: Row of the report.
        dataset: Directory of the dataset.
        seed: Training seed.
        directory: Where the run lives.
        script: ``"train.py"`` or ``"evaluate.py"``.
        command: Its command line.
        speed: Further flags, which change how long it takes and nothing else.
    """

    label: str
    dataset: str
    seed: int
    directory: Path
    script: str
    command: tuple[str, ...]
    speed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Short name for progress and logs."""
        return f"{self.label} {Path(self.dataset).name} s{self.seed}"

    def beside(self, ending: str) -> Path:
        """A file next to the run's directory, whose name may hold dots of its own."""
        return self.directory.with_name(self.directory.name + ending)

    def result(self) -> RunResult | None:
        """The finished result, or None."""
        path = self.directory / "result.json"
        if not path.exists():
            return None
        return replace(load_results(path)[0], label=self.label, seed=self.seed)


def flags(overrides: dict[str, object]) -> list[str]:
    """Turns config overrides into flags of scripts/train.py."""
    out: list[str] = []
    for name, value in overrides.items():
        group, dot, leaf = f"config.{name}".replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            out.append(f"--{group}{dot}{leaf if value else f'no-{leaf}'}")
        else:
            values = value if isinstance(value, list) else [value]
            out += [f"--{group}{dot}{leaf}", *(str(item) for item in values)]
    return out


def plan(args: ComparisonArguments) -> list[Cell]:
    """Lists every cell, checking agents, overrides and targets before anything is trained.

    Raises:
        InvalidInputError: A number is out of range, two cells would be one, or an option has no
            use or no meaning.
        UnknownNameError: An agent, a setting or a dataset is not known.
        CorruptFileError: Targets are given, and a file of ``--trained`` is no artifact.
    """
    counts = (args.eval_episodes, args.workers, args.steps, args.eval_workers, args.eval_envs or 1)
    if min(counts) < 1 or args.eval_envs == 0:
        raise InvalidInputError(
            "--eval-episodes, --eval-workers, --eval-envs, --workers and --steps start at 1."
        )
    targets = targets_by_dataset(args)
    ours, others = list(_trained_here(args, targets)), list(_ready_made(args, targets))
    if targets and not any("--target-returns" in cell.command for cell in ours + others):
        raise InvalidInputError(
            "--target-returns is for return-conditioned agents, and none of --agents and --trained "
            f"is one on these datasets: {', '.join(sorted({c.label for c in ours + others}))}."
        )
    cells = ours + others
    if taken := {cell.label for cell in ours} & {cell.label for cell in others}:
        raise InvalidInputError(f"--trained {taken.pop()} needs a label that no agent has.")
    if len({cell.directory for cell in cells}) != len(cells):
        raise InvalidInputError(
            "Two cells would share a directory; name each agent and dataset once."
        )
    return cells


def check_datasets(datasets: Sequence[str]) -> None:
    """Opens every dataset and looks up its environments, so that nothing fails after training.

    Raises:
        InvalidInputError: There is no such dataset, one has no environment that is registered here,
            or two have the same name, by which results are told apart.
        CorruptFileError: A dataset is damaged.
    """
    folders: dict[str, str] = {}
    for folder in datasets:
        info = open_dataset(folder).info
        worlds_of(info.env_specs)
        if info.name in folders:
            raise InvalidInputError(
                f"{folders[info.name]} and {folder} are both named {info.name!r}, and a report "
                "could not tell them apart. Record or convert one of them again under a name of "
                "its own, or compare them one after the other."
            )
        folders[info.name] = folder


def _trained_here(
    args: ComparisonArguments, targets: Mapping[str, tuple[str, ...]]
) -> Iterator[Cell]:
    """The cells of --agents."""
    _, common = parse_agent(f"common,{args.common}" if args.common else "common")
    parsed = [(name, text, *parse_agent(text)) for name, text in map(split_name, args.agents)]
    ids = [agent for _, _, agent, _ in parsed]
    for name, text, agent, own in parsed:
        found = spec(agent)
        overrides = own if "reference" in found.tags else {**common, **own}
        found.config(overrides)
        label = name or (agent if ids.count(agent) == 1 else text)
        aiming = bool(targets) and _uses_targets(agent)
        for dataset in args.datasets:
            aims = targets[dataset] if aiming else ()
            for seed in args.seeds:
                directory = _place(args, label, dataset, f"s{seed}")
                command = (
                    *("--agent", agent, "--dataset", dataset, "--seed", str(seed)),
                    *("--steps", str(args.steps), "--eval-episodes", str(args.eval_episodes)),
                    *("--eval-every", str(args.eval_every), "--eval-seed", str(args.eval_seed)),
                    *("--videos", str(args.videos if seed == args.seeds[0] else 0)),
                    *("--device", args.device, "--output", str(directory)),
                    *(("--target-returns", *aims) if aims else ()),
                    *flags(overrides),
                )
                speed = _speed(args, "--eval-envs", "--eval-workers")
                yield Cell(label, dataset, seed, directory, "train.py", command, speed)


def _speed(args: ComparisonArguments, envs: str, workers: str) -> tuple[str, ...]:
    """How evaluations run, by the names that a script has for it."""
    named = () if args.eval_envs is None else (envs, str(args.eval_envs))
    return (*named, workers, str(args.eval_workers))


def split_name(text: str) -> tuple[str, str]:
    """Takes the name off 'NAME=id,field=value'; '' where there is none."""
    first, comma, rest = text.partition(",")
    name, _, agent = first.rpartition("=")
    return name.strip(), f"{agent}{comma}{rest}"


def targets_by_dataset(args: ComparisonArguments) -> dict[str, tuple[str, ...]]:
    """``--target-returns`` by directory of the dataset; empty when none are given."""
    if not args.target_returns:
        return {}
    given: dict[str, list[str]] = {dataset: [] for dataset in args.datasets}
    by_name = _by_name(args.datasets)
    for text in args.target_returns:
        name, _, value = text.rpartition("=")
        try:
            float(value)
        except ValueError:
            raise InvalidInputError(
                f"--target-returns takes NUMBER or DATASET=NUMBER, got {text!r}."
            ) from None
        if name and name not in by_name:
            raise unknown_name("dataset of --target-returns", name, by_name)
        for dataset in [by_name[name]] if name else args.datasets:
            given[dataset].append(value)
    return {dataset: tuple(aims) for dataset, aims in given.items()}


def _by_name(datasets: Sequence[str]) -> dict[str, str]:
    return {Path(dataset).name: dataset for dataset in datasets}


def _uses_targets(agent: str) -> bool:
    return load_entry_point(spec(agent).entry_point).uses_target_return


def _artifact_uses_targets(path: str) -> bool:
    from mail_agents.artifact import read_info  # here, because it needs torch

    return _uses_targets(read_info(path)["agent"])


def _ready_made(
    args: ComparisonArguments, targets: Mapping[str, tuple[str, ...]]
) -> Iterator[Cell]:
    """The cells of --trained."""
    by_name = _by_name(args.datasets)
    for text in args.trained:
        label, _, path = text.partition("=")
        if not label or not path:
            raise InvalidInputError(f"--trained takes LABEL=ARTIFACT[@DATASET], got {text!r}.")
        chosen = list(args.datasets)
        artifact, _, name = path.rpartition("@")
        if artifact and not Path(path).exists():
            if name not in by_name:
                raise unknown_name("dataset of --trained", name, by_name)
            path, chosen = artifact, [by_name[name]]
        if not Path(path).exists():
            raise InvalidInputError(f"--trained {label}: there is no file or folder {path!r}.")
        aiming = bool(targets) and _artifact_uses_targets(path)
        for dataset in chosen:
            aims = targets[dataset] if aiming else ()
            directory = _place(args, label, dataset, "trained")
            command = (
                *("--agent", path, "--dataset", dataset, "--episodes", str(args.eval_episodes)),
                *("--seed", str(args.eval_seed), "--videos", str(args.videos)),
                *("--device", args.device, "--output", str(directory)),
                *(("--target-returns", *aims) if aims else ()),
            )
            speed = _speed(args, "--n-envs", "--workers")
            seed = args.seeds[0]
            yield Cell(label, dataset, seed, directory, "evaluate.py", command, speed)


def _place(args: ComparisonArguments, label: str, dataset: str, ending: str) -> Path:
    """Directory of a cell."""
    slug = "".join(c if c.isalnum() or c in "-._" else "-" for c in label)
    return Path(args.output) / "runs" / f"{slug}-{Path(dataset).name}-{ending}"


def check_reusable(cell: Cell) -> None:
    """Refuses to mix cells of two different comparisons in one directory.

    Raises:
        InvalidInputError: The directory holds a run that was made with other settings.
        StorageError: The settings of a new cell cannot be written.
    """
    path = cell.beside(".json")
    if not path.exists():
        write_atomic(path, json.dumps(list(cell.command)).encode())
    elif json.loads(path.read_text("utf-8")) != list(cell.command):
        raise InvalidInputError(
            f"{cell.directory} was trained with other settings ({path}). Choose another --output, "
            "or delete that directory."
        )


def modules_of(args: ComparisonArguments) -> list[str]:
    """Modules that the agents of the comparison will import."""
    found = [spec(parse_agent(split_name(text)[1])[0]) for text in args.agents]
    modules = [one.entry_point.partition(":")[0] for one in found]
    if any("ddpm" in one.tags for one in found):
        modules.append("diffusers")
    return list(dict.fromkeys(modules))
