"""Every registered agent keeps every rule, at its published size unless that takes too long."""

import pytest

from mail_agents import check_agent, list_agents

#: Presets that differ from one of full size in width, depth or arithmetic only.
_SMALLER = {
    agent_id: {"d_model": 32, "layers": 2, "history": 8}
    for agent_id in list_agents(tags=["sequence"])
    if agent_id not in ("dt", "decision-mamba", "dm")
}


@pytest.mark.filterwarnings("ignore:.*shows the policy the actions:UserWarning")
@pytest.mark.parametrize("agent_id", list_agents())
def test_conforms(agent_id):
    report = check_agent(agent_id, overrides=_SMALLER.get(agent_id))
    assert report.ok, f"\n{report}"
