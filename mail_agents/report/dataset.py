"""What is in a dataset: counts, lengths, returns, ranges and broken values, and sample frames."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mail_agents.data.dataset import ArrayDataset
from mail_agents.errors import InvalidInputError

_BINS = 10
_ROWS = 1 << 16


def describe(dataset: ArrayDataset) -> dict[str, Any]:
    """Summarises a dataset as JSON-ready values.

    Returns:
        ``name``, ``sha256``, ``source``, ``episodes``, ``steps``, ``lengths`` and ``returns``
        (``min``, ``median``, ``max``; returns also a histogram of ten bins), ``tasks`` (episodes
        and environment by name) and ``features`` (``kind``, ``shape``, ``dtype``, ``min``,
        ``mean``, ``max``, ``not_finite`` by column).
    """
    info, lengths, returns = dataset.info, dataset.lengths, dataset.returns
    finite = returns[np.isfinite(returns)]
    counts, edges = np.histogram(finite, bins=_BINS) if finite.size else ([], [])
    stats = dataset.stats()
    features = {f"obs/{key}": item for key, item in dataset.features.observations.items()}
    features["action"] = dataset.features.action
    described = {}
    for name, feature in features.items():
        known = stats.get(name.removeprefix("obs/"))
        described[name] = {
            "kind": feature.kind,
            "shape": list(feature.shape),
            "dtype": str(feature.dtype),
            "min": _number(known.min.min()) if known else None,
            "mean": _number(known.mean.mean()) if known else None,
            "max": _number(known.max.max()) if known else None,
            "not_finite": _not_finite(dataset.column(name)),
        }
    tasks = {}
    for i, task in enumerate(info.tasks):
        world = info.env_specs.get(task) or {}
        tasks[task] = {"episodes": int((dataset.task_ids == i).sum()), "env": world.get("id")}
    return {
        "name": info.name,
        "sha256": info.sha256,
        "source": dict(info.source),
        "episodes": info.n_episodes,
        "steps": info.n_steps,
        "lengths": _spread(lengths),
        "returns": {
            **_spread(finite),
            "histogram": {"counts": [int(c) for c in counts], "edges": [float(e) for e in edges]},
        },
        "tasks": tasks,
        "features": described,
    }


def _not_finite(column: np.ndarray) -> int:
    if column.dtype.kind not in "fc":
        return 0
    blocks = (column[start : start + _ROWS] for start in range(0, len(column), _ROWS))
    return sum(int((~np.isfinite(block)).sum()) for block in blocks)


def _spread(values: np.ndarray) -> dict[str, float | None]:
    if not values.size:
        return {"min": None, "median": None, "max": None}
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def print_description(description: dict[str, Any], console: Console) -> None:
    """Prints what :func:`describe` found, for people."""
    d = description
    console.print(
        f"[bold]{escape(d['name'])}[/bold]: {d['episodes']} episodes, {d['steps']:,} steps"
    )
    console.print(f"sha256 {d['sha256']}")
    if d["source"]:
        facts = ", ".join(f"{k} {v}" for k, v in d["source"].items() if isinstance(v, str | int))
        console.print(escape(f"source: {facts}"))
    console.print("lengths: {min:.0f} to {max:.0f}, median {median:.0f}".format(**d["lengths"]))
    if d["tasks"]:
        tasks = Table(title="tasks", title_justify="left")
        for column in ("task", "episodes", "environment"):
            tasks.add_column(column, overflow="fold")
        for name, task in d["tasks"].items():
            tasks.add_row(escape(name), str(task["episodes"]), str(task["env"] or "not recorded"))
        console.print(tasks)
    features = Table(title="features", title_justify="left")
    for column in ("column", "kind", "shape", "dtype", "min", "mean", "max", "not finite"):
        features.add_column(column, overflow="fold", no_wrap=column == "column")
    for name, f in d["features"].items():
        numbers = ["" if f[k] is None else f"{f[k]:.4g}" for k in ("min", "mean", "max")]
        shape = str(tuple(f["shape"]))
        bad = f"[red]{f['not_finite']}[/red]" if f["not_finite"] else "0"
        features.add_row(escape(name), f["kind"], shape, f["dtype"], *numbers, bad)
    console.print(features)
    _print_histogram(d["returns"], console)


def _print_histogram(returns: dict[str, Any], console: Console) -> None:
    counts, edges = returns["histogram"]["counts"], returns["histogram"]["edges"]
    if not counts:
        return
    console.print("returns, episodes per bin:")
    if returns["min"] == returns["max"]:
        console.print(f"  all {returns['min']:.4g}")
        return
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * -(-40 * count // max(counts))
        console.print(f"  {low:10.4g} to {high:10.4g}  {count:6d}  {bar}", highlight=False)


def frame_grid(dataset: ArrayDataset, path: str | Path, rows: int = 4, columns: int = 8) -> Path:
    """Writes a PNG of evenly spaced frames: ``rows`` episodes by ``columns`` steps per camera.

    Args:
        dataset: A dataset with at least one image observation.
        path: PNG file to write; its folder is made.
        rows: Episodes shown, at most.
        columns: Steps shown of each.

    Raises:
        InvalidInputError: No observation is an image.
    """
    import imageio.v3 as iio

    cameras = [k for k, f in dataset.features.observations.items() if f.kind == "image"]
    if not cameras:
        keys = ", ".join(dataset.features.observations)
        raise InvalidInputError(f"The dataset has no images to show; it observes {keys}.")
    episodes = np.unique(np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int))
    lines = []
    for index in episodes:
        observations = dataset.episode(int(index)).observations
        for camera in cameras:
            frames = observations[camera]
            steps = np.linspace(0, len(frames) - 1, columns).astype(int)
            lines.append(np.concatenate(list(frames[steps]), axis=1))
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, 4), (0, width - line.shape[1]), (0, 0))) for line in lines]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, np.concatenate(padded), extension=".png")
    return path
