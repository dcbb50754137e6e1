"""Every registered agent, at its full published size, keeps every rule."""

import pytest

from mail_agents import check_agent, list_agents


@pytest.mark.parametrize("agent_id", list_agents())
def test_conforms(agent_id):
    report = check_agent(agent_id)
    assert report.ok, f"\n{report}"
