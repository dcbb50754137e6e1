"""Agents by name. Registering and listing handle strings only; nothing here imports torch."""

import dataclasses
import fnmatch
import importlib
import importlib.metadata
import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mail_agents.config import AgentConfig
from mail_agents.errors import InvalidInputError, MissingDependencyError, unknown_name
from mail_agents.features import FeatureSpec

if TYPE_CHECKING:
    from mail_agents.agent import Agent

#: Entry-point group of third-party packages; each entry is a function that calls ``register``.
ENTRY_POINT_GROUP = "mail_agents.agents"
_BUILTIN = "mail_agents.agents.builtin:register_agents"
_ID = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")


@dataclass(frozen=True)
class AgentSpec:
    """Everything needed to make an agent, as strings and JSON values.

    Attributes:
        id: Lower-case name, for example ``"mail/ed-ma-ddpm"``.
        entry_point: ``"module:Class"`` of the :class:`~mail_agents.agent.Agent` subclass.
        config_entry_point: ``"module:Class"`` of its :class:`~mail_agents.config.AgentConfig`.
        tags: Words to filter by, for example ``"imitation"``.
        requires: Importable modules the agent needs beyond the core installation.
        paper: Citation of what is implemented.
        kwargs: Config overrides that make this preset, by (dotted or nested) field name.
    """

    id: str
    entry_point: str
    config_entry_point: str
    tags: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()
    paper: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise InvalidInputError(
                f"Agent id {self.id!r} is malformed: use lower-case letters, digits, '.', '_' and "
                "'-', with '/' between namespace and name, for example 'mylab/mlp-v1'."
            )
        for name in ("entry_point", "config_entry_point"):
            if not isinstance(getattr(self, name), str) or getattr(self, name).count(":") != 1:
                raise InvalidInputError(
                    f"{name} of agent {self.id!r} must be a string 'module:Class'; "
                    f"got {getattr(self, name)!r}."
                )
        object.__setattr__(self, "tags", frozenset(self.tags))
        object.__setattr__(self, "requires", tuple(self.requires))
        try:  # as JSON will give it back, so that a spec equals its round trip
            kwargs = json.loads(json.dumps(dict(self.kwargs)))
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"kwargs of agent {self.id!r} must be JSON values: {error}."
            ) from error
        object.__setattr__(self, "kwargs", kwargs)

    def available(self) -> tuple[bool, str]:
        """Returns whether the required modules are installed, and otherwise which are missing."""
        missing = [name for name in self.requires if not _installed(name)]
        if not missing:
            return True, ""
        return False, f"needs {', '.join(missing)}; install with: pip install {' '.join(missing)}"

    def config(self, overrides: Mapping[str, Any] | None = None) -> AgentConfig:
        """Builds this preset's config, with further overrides applied last."""
        config = load_entry_point(self.config_entry_point)()
        return config.replace(self.kwargs).replace(overrides or {})

    def to_json(self) -> str:
        """Returns the spec as canonical JSON."""
        data = dataclasses.asdict(self)
        return json.dumps({**data, "tags": sorted(self.tags)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "AgentSpec":
        """Inverse of :meth:`to_json`."""
        return cls(**json.loads(text))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing
        return False


def load_entry_point(entry_point: str) -> Any:
    """Imports ``"module:name"``.

    Raises:
        MissingDependencyError: The module cannot be imported or lacks the name.
    """
    module, _, name = entry_point.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"Cannot load {entry_point!r}: {type(error).__name__}: {error}. "
            "Check that the package that provides it is installed and up to date."
        ) from error


class Registry:
    """Specs by id, with plugins discovered on the first miss or listing."""

    def __init__(self) -> None:
        self._specs: dict[str, AgentSpec] = {}
        self._discovered = False
        self.plugin_errors: dict[str, str] = {}

    def add(self, spec: AgentSpec) -> None:
        """Adds a spec; an identical repeat does nothing.

        Raises:
            InvalidInputError: The id is taken by a different spec.
        """
        present = self._specs.get(spec.id)
        if present is not None and present != spec:
            raise InvalidInputError(
                f"Agent id {spec.id!r} is already registered by {present.entry_point!r}. "
                "Choose another id; use your own namespace, for example 'mylab/...'."
            )
        self._specs[spec.id] = spec

    def discover(self) -> None:
        """Runs the built-in registration and every installed plugin's, once."""
        if self._discovered:
            return
        self._discovered = True
        load_entry_point(_BUILTIN)()
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            if point.value == _BUILTIN:
                continue
            try:
                point.load()()
            except Exception as error:  # a broken plugin must not take the others down
                self.plugin_errors[point.name] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"Agent plugin {point.name!r} ({point.value}) could not be loaded: "
                    f"{self.plugin_errors[point.name]}",
                    stacklevel=2,
                )

    def get(self, agent_id: str) -> AgentSpec:
        """Looks an id up; ``"module:id"`` imports ``module`` first.

        Raises:
            UnknownNameError: Nothing registers this id.
        """
        module, separator, name = agent_id.rpartition(":")
        if separator:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise MissingDependencyError(
                    f"Cannot import {module!r} to make agent {agent_id!r}: {error}."
                ) from error
        if name not in self._specs:
            self.discover()
        if name not in self._specs:
            hint = "Run 'mail-agents list' to see every agent."
            if self.plugin_errors:
                hint += f" Plugins that failed to load: {self.plugin_errors}."
            raise unknown_name("agent id", name, self._specs, hint)
        return self._specs[name]

    def ids(self) -> list[str]:
        """Every registered id, in natural order."""
        self.discover()
        return sorted(self._specs, key=_natural)


def _natural(text: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", text)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


_registry = Registry()


def register(
    id: str,
    entry_point: str,
    config_entry_point: str,
    *,
    tags: Iterable[str] = (),
    requires: Iterable[str] = (),
    paper: str = "",
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Registers an agent under an id; see :class:`AgentSpec` for the arguments.

    An identical repeat does nothing. Nothing is imported: a wrong entry point shows at ``make``.

    Raises:
        InvalidInputError: The id is malformed or taken by a different agent.
    """
    _registry.add(
        AgentSpec(
            id=id,
            entry_point=entry_point,
            config_entry_point=config_entry_point,
            tags=frozenset(tags),
            requires=tuple(requires),
            paper=paper,
            kwargs=dict(kwargs or {}),
        )
    )


def spec(agent_id: str) -> AgentSpec:
    """Returns the spec of an id.

    Raises:
        UnknownNameError: Nothing registers this id; the message has the nearest one.
    """
    return _registry.get(agent_id)


def list_agents(
    pattern: str = "*", *, tags: Iterable[str] | None = None, available: bool | None = None
) -> list[str]:
    """Lists ids that match a wildcard pattern, carry all ``tags`` and (optionally) can run here."""
    wanted = frozenset(tags or ())
    return [
        agent_id
        for agent_id in _registry.ids()
        if fnmatch.fnmatchcase(agent_id, pattern)
        and wanted <= _registry.get(agent_id).tags
        and (available is None or _registry.get(agent_id).available()[0] == available)
    ]


def plugin_problems() -> dict[str, str]:
    """Why each installed plugin that could not be loaded failed, by its entry point's name."""
    _registry.discover()
    return dict(_registry.plugin_errors)


def pprint_registry(pattern: str = "*") -> str:
    """Returns a readable listing, grouped by namespace."""
    groups: dict[str, list[str]] = {}
    for agent_id in list_agents(pattern):
        namespace = agent_id.rpartition("/")[0] or "(no namespace)"
        groups.setdefault(namespace, []).append(agent_id)
    lines = []
    for namespace, ids in groups.items():
        lines.append(f"===== {namespace} =====")
        for agent_id in ids:
            found = _registry.get(agent_id)
            ok, reason = found.available()
            note = "" if ok else f"  [{reason}]"
            lines.append(f"{agent_id:32s} {', '.join(sorted(found.tags))}{note}")
    return "\n".join(lines)


def make(
    id: str | AgentSpec,
    features: FeatureSpec,
    *,
    config: AgentConfig | Mapping[str, Any] | None = None,
    device: str = "auto",
    seed: int = 0,
    **overrides: Any,
) -> "Agent":
    """Makes an agent for a dataset's or environment's features.

    Args:
        id: Registered id, ``"module:id"`` to import a module first, or a spec.
        features: Observations and actions the agent will see, in environment units.
        config: A complete config (or dictionary of overrides) used instead of the preset's.
        device: ``"auto"`` (CUDA when there is one), or any torch device name.
        seed: Root seed: initial weights, training noise and acting noise derive from it.
        **overrides: Config fields, nested ones as dictionaries: ``history=5``,
            ``encoder={"layers": 2}``.

    Raises:
        UnknownNameError: The id or an override does not exist.
        MissingDependencyError: A package the agent needs is not installed.
        InvalidInputError: A value is out of range, or the features do not suit the agent.
    """
    found = id if isinstance(id, AgentSpec) else _registry.get(id)
    ok, reason = found.available()
    if not ok:
        raise MissingDependencyError(f"Agent {found.id!r} {reason}")
    if config is None or isinstance(config, Mapping):
        config = found.config(config)
    expected = load_entry_point(found.config_entry_point)
    if not isinstance(config, expected):
        raise InvalidInputError(
            f"Agent {found.id!r} takes a {expected.__name__}, got a {type(config).__name__}."
        )
    agent_class = load_entry_point(found.entry_point)
    return agent_class(
        config.replace(overrides), features, agent_id=found.id, device=device, seed=seed
    )
