"""Normalisation whose statistics travel with the weights and are never silently missing."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mail_agents.data.stats import FeatureStats
from mail_agents.errors import FeatureMismatchError, InvalidInputError, MissingStatisticsError

NormMode = Literal["mean_std", "min_max", "quantile", "identity", "bounds"]

#: Lower and upper bounds of a space, flattened, or None where it is unbounded.
Box = tuple[Sequence[float] | None, Sequence[float] | None]

# A spread below float32 resolution of the values themselves is rounding, not signal.
_RELATIVE_SPREAD = 1e-6


class Normalizer(nn.Module):
    """Affine map of a feature to network units, ``(x - offset) / scale``, and back.

    ========== ========================== =====================
    mode       offset                     scale
    ========== ========================== =====================
    mean_std   mean                       population std
    min_max    (max + min) / 2            (max - min) / 2
    quantile   (q99 + q01) / 2            (q99 - q01) / 2
    identity   0                          1
    bounds     (high + low) / 2           (high - low) / 2
    ========== ========================== =====================

    ``bounds`` maps the box ``low..high`` of a space to [-1, 1], whatever the data. A dimension that
    is constant in the data (or the box) has scale 1: it maps to zero, and back to itself. Nothing
    is clipped, so the inverse always holds. All state is in buffers (float32), so it is saved,
    loaded and moved with the module that owns it. ``identity`` and ``bounds`` work without
    statistics, but :meth:`bounds` needs them in every mode.

    Args:
        mode: One of the table above.
        shape: Shape of the statistics: that of one time step, or ``(C,)`` for images.
        name: Feature name for messages.
        box: ``(low, high)`` for mode ``bounds``, each ``prod(shape)`` numbers.

    Raises:
        InvalidInputError: The mode is unknown, or ``bounds`` has no finite box.
    """

    offset: Tensor
    scale: Tensor
    minimum: Tensor
    maximum: Tensor
    known: Tensor

    def __init__(
        self,
        mode: NormMode,
        shape: tuple[int, ...],
        name: str = "",
        box: Box = (None, None),
    ) -> None:
        super().__init__()
        if mode not in get_args(NormMode):
            raise InvalidInputError(
                f"Normaliser mode {mode!r} is unknown; use one of {', '.join(get_args(NormMode))}."
            )
        self.mode: NormMode = mode
        self.shape = tuple(shape)
        self.name = name
        self.register_buffer("offset", torch.zeros(self.shape))
        self.register_buffer("scale", torch.ones(self.shape))
        self.register_buffer("minimum", torch.zeros(self.shape))
        self.register_buffer("maximum", torch.zeros(self.shape))
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))
        # A Python copy: reading the buffer would wait for the accelerator on every call.
        self._fitted = False
        if mode == "bounds":
            offset, scale = self._box_affine(box)
            self.offset.copy_(torch.as_tensor(offset.astype(np.float32)))
            self.scale.copy_(torch.as_tensor(scale.astype(np.float32)))

    def extra_repr(self) -> str:
        """Mode, shape and whether statistics are present."""
        return f"{self.mode}, shape={self.shape}, fitted={self._fitted}"

    @property
    def fitted(self) -> bool:
        """Whether statistics were fitted or loaded."""
        return self._fitted

    @property
    def needs_statistics(self) -> bool:
        """Whether values cannot be mapped without statistics."""
        return self.mode not in ("identity", "bounds")

    def fit(self, stats: FeatureStats) -> "Normalizer":
        """Takes the statistics of a feature, normally those of the training episodes.

        Raises:
            FeatureMismatchError: The statistics have another shape.
            InvalidInputError: A statistic is NaN or infinite.
        """
        if np.shape(stats.mean) != self.shape:
            raise FeatureMismatchError(
                f"{self._label()}: statistics have shape {np.shape(stats.mean)}, expected "
                f"{self.shape}."
            )
        offset, scale = self._affine(stats)
        values = {"offset": offset, "scale": scale, "minimum": stats.min, "maximum": stats.max}
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise InvalidInputError(f"{self._label()}: statistic {name!r} is NaN or infinite.")
            # Two steps: float64 does not exist on every accelerator.
            getattr(self, name).copy_(torch.as_tensor(np.asarray(value, np.float32)))
        self.known.fill_(True)
        self._fitted = True
        return self

    def _affine(self, stats: FeatureStats) -> tuple[np.ndarray, np.ndarray]:
        ones = np.ones(self.shape)
        if self.mode == "identity":
            return np.zeros(self.shape), ones
        if self.mode == "bounds":  # of the box, not of the data
            return self.offset.cpu().numpy(), self.scale.cpu().numpy()
        if self.mode == "mean_std":
            offset, scale = np.asarray(stats.mean), np.asarray(stats.std)
        else:
            low, high = (stats.min, stats.max) if self.mode == "min_max" else (stats.q01, stats.q99)
            offset, scale = (high + low) / 2, (high - low) / 2
        size = np.maximum(np.abs(stats.min), np.abs(stats.max))
        constant = scale <= _RELATIVE_SPREAD * size
        return offset, np.where(constant, ones, scale)

    def _box_affine(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        unknown = np.full(self.shape, np.nan)
        low, high = (
            unknown if bound is None else np.asarray(bound, np.float64).reshape(self.shape)
            for bound in box
        )
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise InvalidInputError(
                f"{self._label()}: mode 'bounds' needs a finite lower and upper bound of every "
                f"value, got {box[0]} and {box[1]}. Take the features from an environment with a "
                "bounded space, or from a dataset recorded in one, or use mode 'min_max'."
            )
        return (high + low) / 2, np.where(high > low, (high - low) / 2, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(..., *shape)`` to network units.

        Raises:
            MissingStatisticsError: Called before :meth:`fit` or loading.
        """
        if self.mode == "identity":
            return x
        if self.needs_statistics:
            self._require()
        return (x - self.offset) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """Maps network units back to the units of the data."""
        if self.mode == "identity":
            return x
        if self.needs_statistics:
            self._require()
        return x * self.scale + self.offset

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of the data, in network units, each of ``shape``."""
        self._require()
        return self(self.minimum), self(self.maximum)

    def _label(self) -> str:
        return f"Normaliser of {self.name!r}" if self.name else "Normaliser"

    def _require(self) -> None:
        if not self._fitted:
            raise MissingStatisticsError(
                f"{self._label()} ({self.mode}, shape {self.shape}): statistics missing. Fit it "
                f"with normalizer.fit(dataset.stats(train_episodes)[{self.name or 'key'!r}]), or "
                "load an artifact that holds them; weights alone cannot act."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._fitted = bool(self.known)
