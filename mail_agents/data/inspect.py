"""What is in a dataset, for a terminal and for scripts."""

from typing import Any

import numpy as np

from mail_agents.data.dataset import ArrayDataset
from mail_agents.errors import InvalidInputError, unknown_name

_BINS = 10
_BLOCK = 1 << 14


def dataset_report(dataset: ArrayDataset) -> dict[str, Any]:
    """Summarises a dataset as JSON-ready data.

    Returns:
        ``name``, ``sha256``, ``episodes``, ``steps``, ``length`` and ``return`` (min, mean, max;
        the return also has a ``histogram`` of counts between ``edges``), ``success`` (share of the
        episodes that report it, or None), ``alignment`` (whether observations are from before or
        after the action beside them, where episodes state it), ``tasks`` (episodes by task) and
        ``features`` (kind, dtype, shape, orientation of images that state it, min, mean, max and
        number of NaN values by key; text has counts only).
    """
    returns = dataset.episode_returns
    counts, edges = np.histogram(returns, bins=_BINS)
    reported = [m["success"] for m in dataset.table.metas if m.get("success") is not None]
    info = dataset.info
    tasks = {task: int((dataset.task_ids == i).sum()) for i, task in enumerate(info.tasks)}
    untold = int((dataset.task_ids < 0).sum())
    return {
        "name": info.name,
        "sha256": info.sha256,
        "source": info.source.get("id"),
        "episodes": info.n_episodes,
        "steps": info.n_steps,
        "length": _range(dataset.lengths),
        "return": {
            **_range(returns),
            "histogram": counts.tolist(),
            "edges": edges.tolist(),
        },
        "success": float(np.mean(reported)) if reported else None,
        "alignment": sorted({m["alignment"] for m in dataset.table.metas if m.get("alignment")}),
        "tasks": {**tasks, **({"(no task)": untold} if untold else {})},
        "features": _features(dataset),
    }


def _range(values: np.ndarray) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def _features(dataset: ArrayDataset) -> dict[str, Any]:
    stats = dataset.stats()
    described = {**dataset.features.observations, "action": dataset.features.action}
    out = {}
    for key, feature in described.items():
        item: dict[str, Any] = {
            "kind": feature.kind,
            "dtype": feature.dtype,
            "shape": list(feature.shape),
        }
        if feature.orientation is not None:
            item["orientation"] = feature.orientation
        if key in stats:
            found = stats[key]
            item.update(min=float(found.min.min()), mean=float(found.mean.mean()))
            item.update(max=float(found.max.max()))
            item["nan"] = _count_nan(dataset.column("action" if key == "action" else f"obs/{key}"))
        out[key] = item
    return out


def _count_nan(array: np.ndarray) -> int:
    if array.dtype.kind not in "fc":
        return 0
    starts = range(0, len(array), _BLOCK)
    return sum(int(np.isnan(array[start : start + _BLOCK]).sum()) for start in starts)


def format_report(report: dict[str, Any]) -> str:
    """Formats :func:`dataset_report` as plain text, with a bar chart of the returns."""
    length, returns = report["length"], report["return"]
    lines = [
        f"{report['name']}  ({report['episodes']} episodes, {report['steps']} steps, "
        f"sha256 {report['sha256'][:12]})",
        f"length  {length['min']:g} .. {length['max']:g}, mean {length['mean']:.1f}",
        f"return  {returns['min']:.4g} .. {returns['max']:.4g}, mean {returns['mean']:.4g}",
    ]
    if report["success"] is not None:
        lines.append(f"success {report['success']:.1%}")
    for alignment in report["alignment"]:
        lines.append(f"observations are from {alignment.replace('_', ' the ')} beside them")
    top = max(returns["histogram"])
    for i, count in enumerate(returns["histogram"]):
        low, high = returns["edges"][i : i + 2]
        lines.append(f"  {low:>10.4g} .. {high:<10.4g} {'#' * round(40 * count / top):<40} {count}")
    lines.append("tasks")
    lines += [f"  {count:>6}  {task}" for task, count in report["tasks"].items()]
    lines.append("features")
    for key, item in report["features"].items():
        text = f"  {key:<24} {item['kind']:<10} {item['dtype']:<8} {tuple(item['shape'])!s:<16}"
        if "mean" in item:
            text += f" min {item['min']:.4g}  mean {item['mean']:.4g}  max {item['max']:.4g}"
            text += f"  NaN {item['nan']}  {item.get('orientation', '')}"
        lines.append(text.rstrip())
    return "\n".join(lines)


def frame_grid(
    dataset: ArrayDataset, key: str, *, episodes: int = 4, frames: int = 6
) -> np.ndarray:
    """Tiles frames of an image feature: one episode per row, time from left to right.

    Args:
        dataset: The dataset.
        key: Observation key of an image feature.
        episodes: Rows at most; the episodes are spread evenly over the dataset.
        frames: Columns; the first and the final observation are included.

    Returns:
        ``(rows * height, frames * width, channels)`` uint8.

    Raises:
        UnknownNameError: There is no such image feature.
        InvalidInputError: A count is smaller than one.
    """
    images = dataset.features.of_kind("image")
    if key not in images:
        raise unknown_name("image feature", key, images, "Only uint8 images can be shown.")
    if episodes < 1 or frames < 1:
        raise InvalidInputError(f"A grid of {episodes} by {frames} frames is empty.")
    name, count = f"obs/{key}", min(episodes, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(np.int64)
    steps = np.linspace(0, dataset.lengths[chosen], frames).round().astype(np.int64).T
    tiles = dataset.column(name)[dataset.starts(name)[chosen][:, None] + steps]
    rows, columns, height, width, channels = tiles.shape
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
