"""``check_agent``: the conformance suite that our tests and plugin authors share."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mail_agents.check_rules import RULES
from mail_agents.check_subject import NotApplicable, Subject, Violation
from mail_agents.data.example import example_features
from mail_agents.features import FeatureSpec
from mail_agents.registry import AgentSpec, spec


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check."""

    name: str
    status: Literal["pass", "fail", "skip"]
    detail: str
    seconds: float


@dataclass(frozen=True)
class CheckReport:
    """Outcome of every check."""

    agent_id: str
    results: list[CheckResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(result.status != "fail" for result in self.results)

    def to_json(self) -> str:
        """Returns the report as JSON."""
        return json.dumps(asdict(self) | {"ok": self.ok}, indent=2)

    def __str__(self) -> str:
        lines = [f"{self.agent_id}: {'conforms' if self.ok else 'DOES NOT CONFORM'}"]
        for result in self.results:
            detail = f"  {result.detail}" if result.detail else ""
            lines.append(f"  {result.status:4s} {result.seconds:6.2f}s  {result.name}{detail}")
        return "\n".join(lines)


def check_agent(
    agent: str | AgentSpec,
    features: FeatureSpec | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
) -> CheckReport:
    """Runs the conformance suite.

    Args:
        agent: Registered id (``"module:id"`` imports a module first) or a spec.
        features: What to make the agent for; a small state and action by default.
        overrides: Config overrides, for example to check a smaller network.

    Returns:
        A report; ``report.ok`` tells whether nothing failed, ``print(report)`` shows why.

    Raises:
        UnknownNameError: The id or an override does not exist.
    """
    found = agent if isinstance(agent, AgentSpec) else spec(agent)
    subject = Subject(found, found.config(overrides), features or example_features())
    results = []
    for rule in RULES:
        began = time.perf_counter()
        status, detail = "pass", ""
        try:
            rule(subject)
        except NotApplicable as reason:
            status, detail = "skip", str(reason)
        except Violation as violation:
            status, detail = "fail", str(violation)
        except Exception as error:  # a crash is a failure of the agent, not of the suite
            status, detail = "fail", f"{type(error).__name__}: {error}"
        name = rule.__name__.replace("_", " ")
        results.append(CheckResult(name, status, detail, time.perf_counter() - began))  # type: ignore[arg-type]
    return CheckReport(found.id, results)
