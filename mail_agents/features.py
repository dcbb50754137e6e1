"""What observations and actions look like: the schema that datasets, environments and agents share.

A dataset and an environment each produce a :class:`FeatureSpec`; it travels inside every artifact,
and :meth:`FeatureSpec.check` explains any disagreement before work starts.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from mail_agents.errors import FeatureMismatchError, InvalidInputError, unknown_name

Kind = Literal["state", "image", "pointcloud", "text", "scalar"]
_KINDS: tuple[str, ...] = get_args(Kind)

#: Which way up images are: "upright"; "raw", rows from bottom to top as OpenGL reads them, which
#: LIBERO's files and stock robosuite observations hold; "rot180", raw turned by 180 degrees as in
#: OpenVLA's data, which is upright with left and right swapped.
Orientation = Literal["raw", "upright", "rot180"]
ORIENTATIONS: tuple[str, ...] = get_args(Orientation)

#: Name given to the single observation of an environment whose observation space is not a Dict.
DEFAULT_KEY = "state"


@dataclass(frozen=True)
class Feature:
    """One observation key, or the action.

    Attributes:
        kind: What the numbers mean; decides encoder and normalisation.
        shape: Shape of one time step. Images are ``(height, width, channels)``.
        dtype: NumPy dtype name, for example ``"float64"`` or ``"uint8"``.
        low: Lower bounds, flattened to ``prod(shape)`` numbers, or None when unbounded.
        high: Upper bounds, like ``low``.
        n: Number of values of a discrete feature, or None; they are ``0..n-1`` unless bounds say
            otherwise.
        orientation: Which way up images are, or None when nobody stated it.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    n: int | None = None
    orientation: Orientation | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InvalidInputError(
                f"Feature kind {self.kind!r} is not one of {', '.join(_KINDS)}."
            )
        if self.orientation is not None:
            _check_orientation(self.orientation)
            if self.kind != "image":
                raise InvalidInputError(
                    f"A {self.kind} feature has no orientation ({self.orientation!r} was given); "
                    "only images have one."
                )

    @property
    def size(self) -> int:
        """Number of values of one time step."""
        return int(np.prod(self.shape, dtype=np.int64))

    def clip(self, values: np.ndarray) -> np.ndarray:
        """Clips ``(..., *shape)`` to the bounds, where there are any."""
        if self.low is None or self.high is None:
            return values
        low, high = (np.asarray(bound).reshape(self.shape) for bound in (self.low, self.high))
        return np.clip(values, low, high)

    def check(self, key: str, value: np.ndarray) -> None:
        """Refuses one time step, or a batch ``(B, *shape)``, that is not what is described.

        Raises:
            InvalidInputError: The shape or type is wrong, or a value is NaN or infinite.
        """
        if self.shape not in (value.shape, value.shape[1:]):
            sizes = ", ".join(map(str, self.shape))
            raise InvalidInputError(
                f"Observation {key!r} has shape {value.shape}, expected (B, {sizes}) or "
                f"{self.shape}."
            )
        if self.kind == "image" and value.dtype != np.uint8:
            raise InvalidInputError(
                f"Observation {key!r} is {value.dtype}, expected uint8 images in 0..255."
            )
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InvalidInputError(f"Observation {key!r} holds NaN or infinity.")

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary, without the fields that are None."""
        out: dict[str, Any] = {"kind": self.kind, "shape": list(self.shape), "dtype": self.dtype}
        if self.low is not None:
            out["low"] = list(self.low)
        if self.high is not None:
            out["high"] = list(self.high)
        if self.n is not None:
            out["n"] = self.n
        if self.orientation is not None:
            out["orientation"] = self.orientation
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Feature":
        """Inverse of :meth:`to_dict`."""
        low, high = data.get("low"), data.get("high")
        return cls(
            kind=data["kind"],
            shape=tuple(int(size) for size in data["shape"]),
            dtype=str(data["dtype"]),
            low=None if low is None else tuple(float(x) for x in low),
            high=None if high is None else tuple(float(x) for x in high),
            n=None if data.get("n") is None else int(data["n"]),
            orientation=data.get("orientation"),
        )

    @classmethod
    def from_array(cls, array: np.ndarray, *, leading: int = 1) -> "Feature":
        """Describes recorded data; ``leading`` axes (time) are not part of the shape."""
        shape = tuple(array.shape[leading:])
        return cls(kind=_kind_of(shape, array.dtype), shape=shape, dtype=_dtype_name(array.dtype))


def _check_orientation(orientation: object) -> None:
    if orientation not in ORIENTATIONS:
        raise InvalidInputError(
            f"Image orientation {orientation!r} is not one of {', '.join(ORIENTATIONS)}."
        )


class ImageSpace(spaces.Box):
    """Images ``(height, width, channels)`` uint8 0..255 that know which way up they are.

    For environments: :meth:`FeatureSpec.from_spaces` reads the orientation, so that an agent
    trained on upside-down images is refused where it would see upright ones.

    Args:
        shape: ``(height, width, channels)``; for a batch ``(N, height, width, channels)``.
        orientation: "raw", "upright" or "rot180"; None when unknown.
        seed: See :class:`gymnasium.spaces.Box`.

    Raises:
        InvalidInputError: The orientation is none of these.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        orientation: Orientation | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        if orientation is not None:
            _check_orientation(orientation)
        super().__init__(0, 255, shape, np.uint8, seed)
        self.orientation: Orientation | None = orientation

    def __repr__(self) -> str:
        return f"ImageSpace({self.shape}, orientation={self.orientation!r})"

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.orientation == getattr(other, "orientation", None)

    __hash__ = None  # type: ignore[assignment]  # as Box: spaces can be changed


@batch_space.register(ImageSpace)
def _batch_images(space: ImageSpace, n: int = 1) -> ImageSpace:
    seed = copy.deepcopy(space.np_random)  # as Gymnasium does for Box
    return ImageSpace((n, *space.shape), space.orientation, seed)


def _dtype_name(dtype: np.dtype) -> str:
    return "str" if dtype.kind in "US" else dtype.name


def _kind_of(shape: tuple[int, ...], dtype: np.dtype) -> Kind:
    if dtype.kind in "US":
        return "text"
    if dtype == np.uint8 and len(shape) == 3:
        return "image"
    if shape == ():
        return "scalar"
    return "state"


def _from_leaf_space(space: spaces.Space) -> Feature:
    if isinstance(space, spaces.Box):
        bounded = bool(np.all(np.isfinite(space.low)) and np.all(np.isfinite(space.high)))
        kind = _kind_of(tuple(space.shape), space.dtype)
        keep = bounded and kind != "image"
        return Feature(
            kind=kind,
            shape=tuple(space.shape),
            dtype=space.dtype.name,
            low=tuple(map(float, space.low.ravel())) if keep else None,
            high=tuple(map(float, space.high.ravel())) if keep else None,
            orientation=getattr(space, "orientation", None) if kind == "image" else None,
        )
    if isinstance(space, spaces.Discrete):
        first, n = int(space.start), int(space.n)
        dtype = np.dtype(space.dtype).name
        if first == 0:
            return Feature("scalar", (), dtype, n=n)
        return Feature("scalar", (), dtype, (float(first),), (float(first + n - 1),), n)
    if isinstance(space, spaces.MultiBinary):
        shape = tuple(space.shape)
        return Feature(kind="state", shape=shape, dtype=np.dtype(space.dtype).name)
    if isinstance(space, spaces.MultiDiscrete):
        high = tuple(float(x) for x in (space.nvec.ravel() - 1))
        dtype = np.dtype(space.dtype).name
        return Feature("state", tuple(space.shape), dtype, low=(0.0,) * len(high), high=high)
    if isinstance(space, spaces.Text):
        return Feature(kind="text", shape=(), dtype="str")
    raise InvalidInputError(
        f"Cannot describe a {type(space).__name__} space. Supported: Box, Discrete, MultiDiscrete, "
        "MultiBinary, Text, and Dict or Tuple of these. Wrap the environment to return one of them."
    )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings and tuples to ``{"a/b": leaf}``.

    Works for observations, infos and Dict/Tuple spaces; a bare leaf becomes ``{"state": leaf}``.
    """
    if isinstance(value, spaces.Dict):
        value = value.spaces
    elif isinstance(value, spaces.Tuple):
        value = tuple(value.spaces)
    if isinstance(value, Mapping):
        items: list[tuple[str, Any]] = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {prefix or DEFAULT_KEY: value}
    out: dict[str, Any] = {}
    for key, item in items:
        out.update(flatten(item, f"{prefix}/{key}" if prefix else key))
    return out


def as_mapping(observation: Any) -> dict[str, np.ndarray]:
    """Turns any Gymnasium observation into ``{key: array}``; a bare array becomes ``state``."""
    return {key: np.asarray(item) for key, item in flatten(observation).items()}


@dataclass(frozen=True)
class FeatureSpec:
    """Schema of observations and actions.

    Attributes:
        observations: Features by key; nested Dict spaces have keys joined with ``/``.
        action: The action feature; ``low``/``high`` are the action bounds in environment units.
    """

    observations: Mapping[str, Feature]
    action: Feature

    def __post_init__(self) -> None:
        object.__setattr__(self, "observations", dict(self.observations))
        if not self.observations:
            raise InvalidInputError("A FeatureSpec needs at least one observation key.")

    def of_kind(self, *kinds: Kind) -> dict[str, Feature]:
        """Observation features of the given kinds, in alphabetical key order."""
        return {k: f for k, f in sorted(self.observations.items()) if f.kind in kinds}

    def rows(self, observation: Any) -> tuple[dict[str, np.ndarray], bool]:
        """Checks an observation and gives every key a batch axis.

        Args:
            observation: ``{key: (B, *shape)}``, or one unbatched observation ``{key: shape}``; a
                bare array stands for the key ``"state"``. Other keys are ignored, text is left out.

        Returns:
            Arrays ``(B, *shape)`` by key, and whether the observation was unbatched.

        Raises:
            UnknownNameError: A key is missing.
            InvalidInputError: A shape or type is wrong, rows disagree, or a value is not finite.
        """
        given = as_mapping(observation)
        wanted = {key: f for key, f in self.observations.items() if f.kind != "text"}
        for key, feature in wanted.items():
            if key not in given:
                raise unknown_name("observation", key, given, "The agent was trained on this key.")
            feature.check(key, given[key])
        unbatched = {given[key].shape == feature.shape for key, feature in wanted.items()}
        single = unbatched == {True}
        rows = {key: given[key][None] if single else given[key] for key in wanted}
        if len(unbatched) > 1 or len({len(value) for value in rows.values()}) > 1:
            shapes = {key: given[key].shape for key in rows}
            raise InvalidInputError(f"Observations disagree in their number of rows: {shapes}.")
        return rows, single

    def select(self, keys: Collection[str]) -> "FeatureSpec":
        """Keeps the named observation keys; none named means all.

        Raises:
            UnknownNameError: A key does not exist.
        """
        for key in keys:
            if key not in self.observations:
                raise unknown_name("observation key", key, self.observations)
        chosen = {key: self.observations[key] for key in keys or self.observations}
        return FeatureSpec(chosen, self.action)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary."""
        observations = {key: f.to_dict() for key, f in sorted(self.observations.items())}
        return {"observations": observations, "action": self.action.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "FeatureSpec":
        """Inverse of :meth:`to_dict`."""
        observations = {key: Feature.from_dict(f) for key, f in data["observations"].items()}
        return cls(observations=observations, action=Feature.from_dict(data["action"]))

    @classmethod
    def from_spaces(
        cls, observation_space: spaces.Space, action_space: spaces.Space
    ) -> "FeatureSpec":
        """Describes an environment from its (single, not batched) spaces.

        Raises:
            InvalidInputError: A space is of a kind that cannot be described.
        """
        leaves = flatten(observation_space)
        observations = {key: _from_leaf_space(space) for key, space in leaves.items()}
        return cls(observations=observations, action=_from_leaf_space(action_space))

    def differences(self, other: "FeatureSpec") -> list[str]:
        """Lists what an agent built for ``self`` would miss or misread in ``other``.

        Keys that only ``other`` has are not differences: an agent may ignore observations. Action
        bounds and image orientations are compared only when both sides know them.
        """
        lines = []
        for key, feature in sorted(self.observations.items()):
            found = other.observations.get(key)
            if found is None:
                present = ", ".join(sorted(other.observations))
                lines.append(f"observation {key!r} is missing (present: {present})")
            elif (found.shape, found.kind) != (feature.shape, feature.kind):
                lines.append(
                    f"observation {key!r}: expected {feature.kind} {feature.shape}, "
                    f"found {found.kind} {found.shape}"
                )
            elif None not in (feature.orientation, found.orientation) and (
                feature.orientation != found.orientation
            ):
                lines.append(
                    f"images {key!r}: expected orientation {feature.orientation}, found "
                    f"{found.orientation} (environments here take orientation="
                    f"{feature.orientation!r})"
                )
        expected, found = self.action, other.action
        if (found.shape, found.n) != (expected.shape, expected.n):
            lines.append(
                f"action: expected shape {expected.shape} (n={expected.n}), "
                f"found {found.shape} (n={found.n})"
            )
        elif None not in (expected.low, found.low) and not (
            np.allclose(np.asarray(expected.low), np.asarray(found.low))
            and np.allclose(np.asarray(expected.high), np.asarray(found.high))
        ):
            lines.append(
                f"action bounds: expected {expected.low}..{expected.high}, "
                f"found {found.low}..{found.high}"
            )
        return lines

    def check(
        self, other: "FeatureSpec", *, this: str = "agent", that: str = "environment"
    ) -> None:
        """Raises when ``other`` cannot feed something built for ``self``.

        Raises:
            FeatureMismatchError: With every difference and what to do about it.
        """
        lines = self.differences(other)
        if lines:
            raise FeatureMismatchError(
                f"The {this} and the {that} disagree:\n  - "
                + "\n  - ".join(lines)
                + f"\nThe {this} was built for the first value in each line. Make the {that} with "
                "the same observation keys, sizes and actions (cameras, image size, wrappers), "
                "or convert the data with 'mail-agents data convert'."
            )
