"""The subcommands of ``mail-agents data``. Nothing heavy is imported before one needs it."""

import importlib.metadata
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitSubcommandPrefixes, Positional, subcommand

from mail_agents.errors import InvalidInputError, MissingDependencyError, unknown_name

if TYPE_CHECKING:
    from mail_agents.data.store import StoreDataset

#: Entry-point group of converters, each ``"module:function"``. ``minari`` reads that format and is
#: called with (source, folder of the new store) and those of :data:`CONVERT_OPTIONS` that the user
#: gives and its signature has; ``to-minari`` writes it: (dataset, output).
CONVERTERS = "mail_agents.converters"
CONVERT_OPTIONS = ("overwrite", "env", "keep_trailing", "demos", "demo_selection", "align")


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


def print_json(value: Any) -> None:
    """Prints a value as JSON; what JSON lacks becomes text."""
    print(json.dumps(value, indent=2, default=str))


def _inspect(command: Inspect) -> int:
    from mail_agents.data.inspect import dataset_report, format_report
    from mail_agents.data.store import open_dataset

    dataset = open_dataset(command.path)
    report = dataset_report(dataset)
    if command.json:
        print_json(report)
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
        # By identity: 0 equals False, and is a number that the conversion shall refuse.
        if (value := getattr(command, key)) is not None and value is not False
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

    episodes = []
    for replayed in replay_dataset(open_dataset(command.path), command.replay):
        print(replayed, flush=True)
        episodes.append(replayed)
    failed = sum(not replayed.ok for replayed in episodes)
    alike = sum(replayed.observed_alike for replayed in episodes)
    if failed:
        print(f"{failed} of {len(episodes)} replayed episodes differ")
    elif alike == len(episodes):
        print("every replayed episode is repeated within tolerance")
    else:
        print(
            f"every replayed episode ended as recorded; {alike} of {len(episodes)} are repeated "
            "within tolerance, the others drifted from the recording on the way"
        )
    return 1 if failed else 0


#: What runs each subcommand; returns the exit status.
RUN: dict[type, Callable[[Any], int]] = {
    Inspect: _inspect,
    Convert: _convert,
    Verify: _verify,
}
