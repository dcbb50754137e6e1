"""Fixtures of the world tests."""

import pytest

import mail_envs  # noqa: F401  (chooses the OpenGL backend before anything imports mujoco)
from mail_envs.rendering import gl_problem

pytest.importorskip("metaworld", reason="metaworld is not installed (extra 'sim')")


@pytest.fixture(scope="session")
def gl() -> None:
    """Skips the test, with the reason, where no image can be rendered."""
    problem = gl_problem()
    if problem:
        pytest.skip(problem)
