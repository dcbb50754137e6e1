"""Facts of simulated worlds are those of the installed packages."""

import json
from pathlib import Path

import pytest

from mail_wrappers.worlds import OSC_POSE


def test_the_controller_is_robosuites():
    robosuite = pytest.importorskip("robosuite")
    path = Path(robosuite.__file__).parent / "controllers" / "config" / "osc_pose.json"
    upstream = json.loads(path.read_text(encoding="utf-8"))
    assert {**upstream, **OSC_POSE} == upstream
