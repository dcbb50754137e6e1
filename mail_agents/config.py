"""Typed, frozen configurations: strict to and from JSON, overridable by dotted names."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar, cast, get_args, get_origin, get_type_hints

import dacite

from mail_agents.errors import InvalidInputError, suggest, unknown_name

C = TypeVar("C")


@dataclass(frozen=True)
class OptimConfig:
    """How an agent's parameters are updated."""

    name: Literal["adam", "adamw"] = "adam"
    """Optimiser."""
    lr: float = 5e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam moment decays."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    weight_decay: float = 0.0
    """Weight decay of the parameters that ``decayed`` names."""
    decayed: Literal["matrices", "all", "all_but_biases_and_layernorms"] = "matrices"
    """What decays. 'matrices': matrices and convolution kernels, but no embeddings and state-space
    parameters. The others are those of released codes, for comparison with them; RMSNorms,
    embeddings and state-space parameters decay under both."""
    grad_clip: float | None = None
    """Largest gradient norm, or None for no clipping."""
    warmup_steps: int = 0
    """Steps of linear learning-rate warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up."""
    batch_size: int = 256
    """Windows per update."""

    def __post_init__(self) -> None:
        # Written so that NaN, which compares as False with everything, is refused.
        valid = (
            0 < self.lr < math.inf
            and all(0 <= beta < 1 for beta in self.betas)
            and 0 < self.eps < math.inf
            and 0 <= self.weight_decay < math.inf
            and (self.grad_clip is None or 0 < self.grad_clip < math.inf)
            and self.warmup_steps >= 0
            and self.batch_size >= 1
        )
        if not valid:
            raise InvalidInputError(
                "OptimConfig needs lr > 0, betas in [0, 1), eps > 0, weight_decay >= 0, "
                "grad_clip > 0 or None, warmup_steps >= 0 and batch_size >= 1, all finite; "
                f"got {self}."
            )


@dataclass(frozen=True)
class AgentConfig:
    """What every agent has: time, units and optimisation."""

    history: int = 1
    """Observed steps shown to the policy, the current one included."""
    horizon: int = 1
    """Predicted actions per plan (chunk length)."""
    execute: int | None = None
    """Actions executed before planning again; None executes the whole chunk."""
    padding: Literal["edge", "none", "right", "left_legacy"] = "edge"
    """'edge': windows reach past both episode ends, masked. 'none': complete windows only, and the
    first plans of an episode see a shorter history (legacy behaviour of several releases). For
    agents that train on segments of trajectories, 'right': padding after the end of an episode in
    training, none in acting; 'left_legacy': padding before the start, as released code has it."""
    state_norm: Literal["mean_std", "min_max", "quantile", "identity"] = "mean_std"
    """Normalisation of state observations."""
    action_norm: Literal["mean_std", "min_max", "quantile", "identity", "bounds"] = "mean_std"
    """Normalisation of actions; 'bounds' maps the box of the action space to [-1, 1]."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights used for acting; None for no EMA."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser settings."""

    def __post_init__(self) -> None:
        if self.history < 1 or self.horizon < 1:
            raise InvalidInputError(
                f"history and horizon must be at least 1; got history={self.history}, "
                f"horizon={self.horizon}."
            )
        if self.execute is not None and not 1 <= self.execute <= self.horizon:
            raise InvalidInputError(
                f"execute must be between 1 and horizon={self.horizon}; got {self.execute}."
            )
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise InvalidInputError(f"ema_decay must be in [0, 1); got {self.ema_decay}.")

    @property
    def executed(self) -> int:
        """Actions executed per plan, resolved: ``execute`` or the whole ``horizon``."""
        return self.horizon if self.execute is None else self.execute

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dictionary (tuples become lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds a config from a complete or partial dictionary, refusing unknown keys and types.

        Raises:
            UnknownNameError: A key is not a field.
            InvalidInputError: A value has the wrong type or is out of range.
        """
        return _build(cls, _renamed(data))

    def replace(self, overrides: Mapping[str, Any]) -> Self:
        """Returns a copy with changed fields.

        Args:
            overrides: Values by field name; nested fields as nested mappings or dotted names, for
                example ``{"encoder.layers": 2, "history": 5}``.

        Raises:
            UnknownNameError: A field does not exist.
            InvalidInputError: A value has the wrong type or is out of range.
        """
        data = self.to_dict()
        for name, value in overrides.items():
            _assign(type(self), data, name.split("."), value, name)
        return _build(type(self), data)


def _build(cls: type[C], data: Mapping[str, Any]) -> C:
    _check_keys(cls, data)
    config = dacite.Config(strict=True, cast=[tuple])
    try:
        return dacite.from_dict(cls, data, config)
    except dacite.WrongTypeError as error:
        raise _wrong_value(cls, error) from error
    except dacite.DaciteError as error:
        raise InvalidInputError(f"{cls.__name__}: {error}.") from error


def _wrong_value(cls: type, error: dacite.WrongTypeError) -> InvalidInputError:
    if get_origin(error.field_type) is not Literal:
        return InvalidInputError(f"{cls.__name__}: {error}.")
    valid = [str(choice) for choice in get_args(error.field_type)]
    return InvalidInputError(
        f"{cls.__name__} has no choice {error.value!r} for {error.field_path}."
        f"{suggest(str(error.value), valid)} Valid: {', '.join(valid)}."
    )


def _renamed(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads what files of earlier versions hold: ``optim.decay_all`` became ``optim.decayed``."""
    optim = data.get("optim")
    if not isinstance(optim, Mapping) or "decay_all" not in optim:
        return data
    decayed = "all" if optim["decay_all"] else "matrices"
    kept = {key: value for key, value in optim.items() if key != "decay_all"}
    return {**data, "optim": {"decayed": decayed, **kept}}


def _check_keys(cls: type, data: Mapping[str, Any], path: str = "") -> None:
    """Names unknown keys with the class they were looked for in; dacite names the outermost one."""
    names = [f.name for f in dataclasses.fields(cls)]
    types = get_type_hints(cls)
    for key, value in data.items():
        if key not in names:
            hint = f"(given as {path + key!r})" if path else ""
            raise unknown_name(f"field of {cls.__name__}", key, names, hint)
        if dataclasses.is_dataclass(types[key]) and isinstance(value, Mapping):
            _check_keys(cast(type, types[key]), value, f"{path}{key}.")


def _assign(cls: Any, data: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    if path[0] not in names:
        raise unknown_name(f"field of {cls.__name__}", path[0], names, f"(given as {name!r})")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    nested = get_type_hints(cls)[path[0]]
    is_nested = dataclasses.is_dataclass(nested)
    if len(path) > 1:
        if not is_nested:
            raise InvalidInputError(f"{name!r}: {path[0]!r} of {cls.__name__} has no fields.")
        _assign(nested, data[path[0]], path[1:], value, name)
    elif is_nested and isinstance(value, Mapping):
        for key, item in value.items():
            _assign(nested, data[path[0]], str(key).split("."), item, f"{name}.{key}")
    else:
        data[path[0]] = list(value) if isinstance(value, tuple) else value


def parse_agent(text: str) -> tuple[str, dict[str, Any]]:
    """Splits an agent string into its id and overrides.

    Args:
        text: ``"mail/ed-ma-bc"`` or ``"mail/ed-ma-bc,encoder.layers=2,optim.lr=1e-3"``. Values are
            JSON where they parse as JSON, else text.

    Raises:
        InvalidInputError: A part is not ``name=value``.
    """
    agent_id, *parts = [part.strip() for part in text.split(",")]
    overrides: dict[str, Any] = {}
    for part in parts:
        name, separator, value = part.partition("=")
        if not separator or not name:
            raise InvalidInputError(
                f"{text!r}: {part!r} is not an override. Write 'ID,field=value,nested.field=value'."
            )
        try:
            overrides[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = value
    return agent_id, overrides
