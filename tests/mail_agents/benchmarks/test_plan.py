"""Plans: the plain loop and ours agree, and the bars compare them."""

import pytest

from mail_agents.benchmarks import plan
from mail_agents.benchmarks.arguments import Plan
from mail_agents.errors import MailAgentsError

TINY = Plan(rounds=1, batch_sizes=(1,), history=2, horizon=2)


@pytest.fixture
def small(monkeypatch):
    """Agents of two blocks with three denoising steps."""
    real = plan.build
    layers = {"encoder.layers": 1, "decoder.layers": 1, "diffusion_steps": 3, "width": 16}
    monkeypatch.setattr(
        plan, "build", lambda agent, args, **over: real(agent, args, **over | layers)
    )


def test_plans_are_timed_and_judged(small):
    report = plan.run(TINY)
    (table,) = report.tables
    assert table.header == ("plans at a time", "plain loop", "native", "torch", "act()", "ED-Tr")
    assert [len(row) for row in table.rows] == [6]
    assert table.rows[0][1].endswith("(1x)")
    assert {"torch", "act()", "ED-Tr"} <= set(report.figures["1 row"]["seconds"])
    assert [bar.required for bar in report.bars] == [3.0, 1.0]
    assert all(bar.measured for bar in report.bars)


def test_several_rows_have_no_bar(small):
    report = plan.run(Plan(rounds=1, batch_sizes=(3,), history=2, horizon=2))
    assert report.tables[0].rows[0][0] == "3 rows"
    assert report.bars == []


def test_unequal_plans_are_refused(small, monkeypatch):
    real = plan.plain_plan
    monkeypatch.setattr(plan, "plain_plan", lambda *arguments: real(*arguments) + 0.1)
    with pytest.raises(MailAgentsError, match="would be unfair"):
        plan.run(TINY)


def test_sizes_of_the_networks_are_printed():
    agents = [plan.build(name, TINY) for name in (TINY.agent, TINY.twin)]
    first, second = plan._notes(TINY, *agents)
    assert "parameters" in first
    assert "act()" in second


def test_the_twin_has_as_many_parameters():
    args = Plan()
    ours, twin = (
        plan.policy_of(agent).backbone
        for agent in (
            plan.build(args.agent, args),
            plan.build(args.twin, args, **{"decoder.layers": args.twin_layers}),
        )
    )
    sizes = [sum(p.numel() for p in net.parameters()) for net in (ours, twin)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.03)
