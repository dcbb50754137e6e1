"""The ``mail-agents`` command. Nothing heavy is imported before a subcommand needs it."""

import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, subcommand

from mail_agents.errors import (
    InvalidInputError,
    MailAgentsError,
    MissingDependencyError,
    unknown_name,
)

if TYPE_CHECKING:
    from mail_agents.data.store import StoreDataset

#: Entry-point group of converters, each ``"module:function"``. ``minari`` reads that format and is
#: called with (source, folder of the new store) and those of :data:`CONVERT_OPTIONS` that the user
#: gives and its signature has; ``to-minari`` writes it: (dataset, output).
CONVERTERS = "mail_agents.converters"
CONVERT_OPTIONS = ("overwrite", "env", "keep_trailing", "demos", "demo_selection", "align")


@dataclass(frozen=True)
class List:
    """List the registered agents, yours and other packages' included."""

    pattern: Positional[str] = "*"
    """Wildcard pattern, for example 'mail/*'."""
    tags: tuple[str, ...] = ()
    """Only agents that carry all of these tags."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Spec:
    """Show what an agent is and every setting of its configuration."""

    id: Positional[str]
    """Agent id, for example 'mail/ed-ma-ddpm'."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Check:
    """Run the conformance suite on agents; the exit status says whether they conform."""

    ids: Positional[tuple[str, ...]]
    """Agent ids; 'module:id' imports a module first."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Info:
    """Show what an artifact (agent.safetensors) holds, without loading it."""

    file: Positional[Path]
    """The artifact, or a checkpoint folder."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Inspect:
    """Show episodes, lengths, returns, tasks, and the range of every feature of a store."""

    path: Positional[Path]
    """Folder of the store."""
    frames: Path | None = None
    """Folder for a PNG of sample frames of each camera."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Convert:
    """Convert other formats to our store, or a store to another format.

    Name the other format on its side: 'minari:D4RL/door/human-v2 data/door' reads, 'data/door
    minari:mine/door-v0' writes. Without arguments the formats are listed.
    """

    source: Positional[str] = ""
    """'FORMAT:NAME-OR-PATH', or the folder of a store."""
    output: Positional[str] = ""
    """Folder of the new store, or 'FORMAT:NAME-OR-PATH'."""
    overwrite: bool = False
    """Replace an existing store once the new one is complete."""
    env: str | None = None
    """Gymnasium id of the environment that data of your own were recorded in (d4rl)."""
    keep_trailing: bool = False
    """Keep the rows after the last end of an episode (d4rl)."""
    demos: int | None = None
    """Demonstrations to take of each file (libero, robomimic); all by default."""
    demo_selection: Literal["first", "mail_legacy"] | None = None
    """Which ones: 'first', the default, or those that MaIL's released code takes (libero)."""
    align: Literal["stored", "causal"] | None = None
    """'stored', the default, keeps LIBERO's pairs of an action with the image taken after it, as
    published results do; 'causal' pairs each image with the next action (libero)."""


@dataclass(frozen=True)
class Verify:
    """Recompute every checksum of a store and look for values that are not finite."""

    path: Positional[Path]
    """Folder of the store."""
    replay: int = 0
    """Episodes per task to repeat in the environment: same start, same actions. The exit status is
    1 if one does not end as it was recorded."""


@dataclass(frozen=True)
class Data:
    """Inspect, convert and verify data sets."""

    command: OmitSubcommandPrefixes[
        Annotated[Inspect, subcommand("inspect")]
        | Annotated[Convert, subcommand("convert")]
        | Annotated[Verify, subcommand("verify")]
    ]


@dataclass(frozen=True)
class Doctor:
    """Show what works on this machine, what does not, and the command that repairs it."""

    json: bool = False
    """Print JSON."""


Command = (
    Annotated[List, subcommand("list")]
    | Annotated[Spec, subcommand("spec")]
    | Annotated[Check, subcommand("check")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Doctor, subcommand("doctor")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name; None takes them from the process.

    Returns:
        Exit status: 0 for success, 1 for failure (with one paragraph on standard error), 2 for a
        command line that cannot be understood (raised as SystemExit), 130 when interrupted.
    """
    command: Any = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="mail-agents",
        description="Sequence-policy agents for imitation learning and offline RL.",
        args=arguments,
    )
    if isinstance(command, Data):
        command = command.command
    try:
        status = _RUN[type(command)](command)
        sys.stdout.flush()
        return status
    except MailAgentsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (head, less) went away; nothing more can be said to it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _list(command: List) -> int:
    from mail_agents import registry

    ids = registry.list_agents(command.pattern, tags=command.tags)
    if command.json:
        _print_json([json.loads(registry.spec(agent_id).to_json()) for agent_id in ids])
    elif ids:
        width = max(map(len, ids)) + 2
        for agent_id in ids:
            found = registry.spec(agent_id)
            ok, reason = found.available()
            note = "" if ok else f"  [{reason}]"
            print(f"{agent_id:{width}s}{', '.join(sorted(found.tags))}{note}".rstrip())
    if not ids:
        tags = f" with tags {', '.join(command.tags)}" if command.tags else ""
        raise InvalidInputError(
            f"No agent matches {command.pattern!r}{tags}. 'mail-agents list' shows all."
        )
    return 0


def _spec(command: Spec) -> int:
    from mail_agents import registry

    found = registry.spec(command.id)
    document = json.loads(found.to_json())
    try:
        config = found.config().to_dict()
    except MissingDependencyError as error:
        config = {"unavailable": str(error)}
    if command.json:
        _print_json({**document, "config": config})
        return 0
    ok, reason = found.available()
    print(found.id)
    for name, value in (
        ("paper", found.paper),
        ("class", found.entry_point),
        ("config class", found.config_entry_point),
        ("tags", ", ".join(sorted(found.tags))),
        ("works here", "yes" if ok else f"no, {reason}"),
    ):
        if value:
            print(f"  {name:13s} {value}")
    print("  config (override with scripts/train.py --agent ID --config.NAME VALUE)")
    for name, value in _flat(config):
        print(f"    {name:28s} {json.dumps(value)}")
    return 0


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows


def _check(command: Check) -> int:
    from mail_agents.check import check_agent

    if not command.ids:
        raise InvalidInputError("Name at least one agent; 'mail-agents list' shows them.")
    reports = [check_agent(agent_id) for agent_id in command.ids]
    if command.json:
        _print_json([json.loads(report.to_json()) for report in reports])
    else:
        print("\n".join(map(str, reports)))
    return 0 if all(report.ok for report in reports) else 1


def _info(command: Info) -> int:
    from mail_agents.checkpoint import read_info

    info = read_info(command.file)
    if command.json:
        _print_json(info)
        return 0
    print(f"{command.file}: {info['agent']}")
    print(f"  {'parameters':28s} {info['parameters']:,}")
    print(f"  {'file':28s} {info['bytes'] / 1e6:.1f} MB")
    rest = {k: v for k, v in info.items() if k not in ("agent", "parameters", "bytes")}
    for name, value in _flat(rest):
        print(f"  {name:28s} {json.dumps(value)}")
    return 0


def _inspect(command: Inspect) -> int:
    from mail_agents.data.inspect import dataset_report, format_report
    from mail_agents.data.store import open_dataset

    dataset = open_dataset(command.path)
    report = dataset_report(dataset)
    if command.json:
        _print_json(report)
    else:
        print(format_report(report))
    if command.frames is not None:
        for path in _write_frames(dataset, command.frames):
            print(f"frames: {path}", file=sys.stderr)
    return 0


def _write_frames(dataset: "StoreDataset", folder: Path) -> list[Path]:
    import imageio.v3 as iio

    from mail_agents.data.inspect import frame_grid

    cameras = dataset.features.of_kind("image")
    if not cameras:
        keys = ", ".join(dataset.features.observations)
        raise InvalidInputError(f"There are no images to show; the data set observes {keys}.")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for camera in cameras:
        path = folder / f"{camera.replace('/', '-')}.png"
        iio.imwrite(path, frame_grid(dataset, camera))
        written.append(path)
    return written


def _convert(command: Convert) -> int:
    points = {p.name: p for p in importlib.metadata.entry_points(group=CONVERTERS)}
    if not command.source:
        print("\n".join(f"{name:20s}{point.value}" for name, point in sorted(points.items())))
        return 0
    if not command.output:
        raise InvalidInputError(
            f"Say where to write: mail-agents data convert {command.source} PATH"
        )
    reads, source = _split_format(command.source)
    writes, output = _split_format(command.output)
    if bool(reads) == bool(writes):
        raise InvalidInputError(
            "Name the other format on exactly one side, as in 'mail-agents data convert "
            f"FORMAT:{command.source} {command.output}'. Formats: {', '.join(sorted(points))}."
        )
    options: dict[str, Any] = {
        key: value
        for key in CONVERT_OPTIONS
        if (value := getattr(command, key)) not in (None, False)
    }
    if writes and command.overwrite:
        raise InvalidInputError(
            f"--overwrite replaces stores only. Choose another name than {command.output!r}, or "
            "delete what is there first."
        )
    name = reads or f"to-{writes}"
    if name not in points:
        hint = "" if points else "Install the project so that its converters are found: make setup"
        raise unknown_name("conversion", name, points, hint)
    try:
        convert = points[name].load()
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"Conversion {name!r} ({points[name].value}) cannot be loaded: "
            f"{type(error).__name__}: {error}."
        ) from error
    try:
        inspect.signature(convert).bind(source, output, **options)
    except TypeError as error:
        raise InvalidInputError(f"Conversion {name!r} has no such option: {error}.") from error
    if writes:
        from mail_agents.data.store import open_dataset

        convert(open_dataset(source), output, **options)
    else:
        convert(source, output, **options)
    print(f"wrote {command.output}")
    return 0


def _split_format(text: str) -> tuple[str, str]:
    """Splits ``FORMAT:REST``; a single letter is a Windows drive, not a format."""
    name, colon, rest = text.partition(":")
    return (name, rest) if colon and len(name) > 1 and "/" not in name else ("", text)


def _verify(command: Verify) -> int:
    from mail_agents.data.store import verify_dataset

    info = verify_dataset(command.path)
    print(f"{command.path}: in order, {info.n_episodes} episodes, {info.n_steps:,} steps")
    print(f"sha256 {info.sha256}")
    if not command.replay:
        return 0
    from mail_agents.data.store import open_dataset
    from mail_agents.replay import replay_dataset

    judged = []
    for replayed in replay_dataset(open_dataset(command.path), command.replay):
        print(replayed, flush=True)
        judged.append(replayed.ok)
    failed = judged.count(False)
    print(
        f"{failed} of {len(judged)} replayed episodes differ"
        if failed
        else "every replayed episode is reproduced"
    )
    return 1 if failed else 0


def _doctor(command: Doctor) -> int:
    from rich.console import Console

    from mail_agents.doctor import print_report, run_doctor

    report = run_doctor()
    if command.json:
        _print_json(report)
    else:
        print_report(report, Console())
    return 0 if report["ok"] else 1


_RUN: dict[type, Callable[[Any], int]] = {
    List: _list,
    Spec: _spec,
    Check: _check,
    Info: _info,
    Inspect: _inspect,
    Convert: _convert,
    Verify: _verify,
    Doctor: _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
