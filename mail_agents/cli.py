"""The ``mail-agents`` command. Nothing heavy is imported before a subcommand needs it."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, subcommand

from mail_agents import data_cli
from mail_agents.data_cli import print_json
from mail_agents.errors import InvalidInputError, MailAgentsError, MissingDependencyError


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
class Doctor:
    """Show what works on this machine, what does not, and the command that repairs it."""

    json: bool = False
    """Print JSON."""


Command = (
    Annotated[List, subcommand("list")]
    | Annotated[Spec, subcommand("spec")]
    | Annotated[Check, subcommand("check")]
    | Annotated[Info, subcommand("info")]
    | Annotated[data_cli.Data, subcommand("data")]
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
    if isinstance(command, data_cli.Data):
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


def _list(command: List) -> int:
    from mail_agents import registry

    ids = registry.list_agents(command.pattern, tags=command.tags)
    if command.json:
        print_json([json.loads(registry.spec(agent_id).to_json()) for agent_id in ids])
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
        print_json({**document, "config": config})
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
        print_json([json.loads(report.to_json()) for report in reports])
    else:
        print("\n".join(map(str, reports)))
    return 0 if all(report.ok for report in reports) else 1


def _info(command: Info) -> int:
    from mail_agents.checkpoint import read_info

    info = read_info(command.file)
    if command.json:
        print_json(info)
        return 0
    print(f"{command.file}: {info['agent']}")
    print(f"  {'parameters':28s} {info['parameters']:,}")
    print(f"  {'file':28s} {info['bytes'] / 1e6:.1f} MB")
    rest = {k: v for k, v in info.items() if k not in ("agent", "parameters", "bytes")}
    for name, value in _flat(rest):
        print(f"  {name:28s} {json.dumps(value)}")
    return 0


def _doctor(command: Doctor) -> int:
    from rich.console import Console

    from mail_agents.doctor import print_report, run_doctor

    report = run_doctor()
    if command.json:
        print_json(report)
    else:
        print_report(report, Console())
    return 0 if report["ok"] else 1


_RUN: dict[type, Callable[[Any], int]] = {
    List: _list,
    Spec: _spec,
    Check: _check,
    Info: _info,
    **data_cli.RUN,
    Doctor: _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
