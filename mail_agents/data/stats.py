"""Statistics of features: streamed moments, bounds and quantiles, in float64."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mail_agents.errors import InvalidInputError
from mail_agents.features import Kind

#: Quantiles kept beside the moments.
QUANTILES = (0.01, 0.99)
_BLOCK_BYTES = 8 << 20
_QUANTILE_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Statistics of one feature; every array is float64.

    The shape is that of one time step, except for images and point clouds: one number per channel,
    ``(C,)``, over all pixels or points.

    Attributes:
        mean: Arithmetic mean.
        std: Population standard deviation (divides by the count).
        min: Smallest value.
        max: Largest value.
        q01: 1 % quantile, linearly interpolated, exact for everything but float point clouds of
            more than 32 million values per channel (evenly strided sample).
        q99: 99 % quantile, like ``q01``.
        count: Number of values behind each entry.
    """

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v if k == "count" else np.asarray(v).tolist() for k, v in out.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "FeatureStats":
        """Inverse of :meth:`to_dict`."""
        arrays = {
            f.name: np.asarray(data[f.name], np.float64) for f in fields(cls) if f.name != "count"
        }
        return cls(**arrays, count=int(data["count"]))


class RunningMoments:
    """Mean, variance and bounds of rows that arrive in blocks.

    Blocks are merged with the pairwise update of Chan, Golub and LeVeque (1979), which does not
    cancel for large offsets as a sum of squares does.

    Args:
        size: Number of columns D.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = np.zeros(size)
        self.m2 = np.zeros(size)
        self.min = np.full(size, np.inf)
        self.max = np.full(size, -np.inf)

    def update(self, block: np.ndarray) -> None:
        """Adds rows ``(n, D)``."""
        n = len(block)
        if n == 0:
            return
        block = block.astype(np.float64, copy=False)
        mean = block.mean(axis=0)
        m2 = np.square(block - mean).sum(axis=0)
        total = self.count + n
        delta = mean - self.mean
        self.mean = self.mean + delta * (n / total)
        self.m2 = self.m2 + m2 + np.square(delta) * (self.count * n / total)
        self.min = np.minimum(self.min, block.min(axis=0))
        self.max = np.maximum(self.max, block.max(axis=0))
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation ``(D,)``."""
        return np.sqrt(self.m2 / max(self.count, 1))


def feature_stats(array: np.ndarray, rows: np.ndarray, kind: Kind) -> FeatureStats:
    """Statistics of ``array[rows]`` with bounded memory.

    Args:
        array: Flat column ``(N, *shape)`` of numbers.
        rows: Row indices ``(n,)``.
        kind: Kind of the feature; images and point clouds are reduced per channel.

    Raises:
        InvalidInputError: There are no rows, or the values are text.
    """
    if len(rows) == 0:
        raise InvalidInputError(
            "Statistics of no steps are undefined; choose at least one episode."
        )
    if array.dtype.kind not in "biuf":
        raise InvalidInputError(f"Statistics of {array.dtype} values are undefined; use numbers.")
    if kind == "image" and array.dtype == np.uint8:
        return _histogram_stats(array, rows)
    per_channel = kind in ("image", "pointcloud") and array.ndim > 1
    shape = array.shape[-1:] if per_channel else array.shape[1:]
    size = int(np.prod(shape, dtype=np.int64))
    if size == 0:  # for example the activations of a model without muscles
        return FeatureStats(*(np.zeros(shape) for _ in range(6)), count=len(rows))
    moments = RunningMoments(size)
    for block in _blocks(array, rows):
        moments.update(block.reshape(-1, size))
    low, high = _quantiles(array, rows, size)
    return FeatureStats(
        mean=moments.mean.reshape(shape),
        std=moments.std.reshape(shape),
        min=moments.min.reshape(shape),
        max=moments.max.reshape(shape),
        q01=low.reshape(shape),
        q99=high.reshape(shape),
        count=moments.count,
    )


def _blocks(array: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    row_bytes = max(1, array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64)))
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, len(rows), step):
        yield np.take(array, rows[start : start + step], axis=0)


def _quantiles(array: np.ndarray, rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of each of ``size`` columns, a few columns at a time."""
    flat = array.reshape(len(array), -1, size)
    limit = _QUANTILE_BYTES // 8
    stride = max(1, -(-len(rows) * flat.shape[1] // limit)) if flat.shape[1] > 1 else 1
    rows = rows[::stride]
    group = max(1, limit // max(1, len(rows) * flat.shape[1]))
    out = np.empty((len(QUANTILES), size))
    for start in range(0, size, group):
        part = flat[:, :, start : start + group][rows].astype(np.float64)
        part = part.reshape(-1, part.shape[-1])
        out[:, start : start + group] = np.quantile(part, QUANTILES, axis=0)
    return out[0], out[1]


def _histogram_stats(array: np.ndarray, rows: np.ndarray) -> FeatureStats:
    """uint8 images: 256-bin counts per channel give every statistic exactly."""
    channels = array.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for block in _blocks(array, rows):
        pixels = block.reshape(-1, channels)
        for start in range(0, len(pixels), 1 << 16):  # stays in cache: five times faster
            part = pixels[start : start + (1 << 16)]
            for channel in range(channels):
                counts[channel] += np.bincount(part[:, channel], minlength=256)
    values = np.arange(256, dtype=np.float64)
    total = int(counts[0].sum())
    mean = counts @ values / total
    variance = (counts * np.square(values - mean[:, None])).sum(axis=1) / total
    present = counts > 0
    low, high = (_histogram_quantile(counts, total, q) for q in QUANTILES)
    return FeatureStats(
        mean=mean,
        std=np.sqrt(variance),
        min=present.argmax(axis=1).astype(np.float64),
        max=255.0 - present[:, ::-1].argmax(axis=1),
        q01=low,
        q99=high,
        count=total,
    )


def _histogram_quantile(counts: np.ndarray, total: int, q: float) -> np.ndarray:
    position = q * (total - 1)
    below = int(np.floor(position))
    cumulative = np.cumsum(counts, axis=1)
    out = []
    for row in cumulative:
        left, right = np.searchsorted(row, [below, min(below + 1, total - 1)], side="right")
        out.append(left + (right - left) * (position - below))
    return np.array(out, np.float64)
