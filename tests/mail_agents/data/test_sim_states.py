import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_agents.data.sim_states import STATE_WIDTH, narrow_states, widen_states


@given(st.integers(1, 140), st.integers(1, 4))
def test_states_come_back_whole(width, rows):
    states = np.random.default_rng(width).normal(size=(rows, width))
    wide = widen_states(states)
    assert wide.shape == (rows, max(width, STATE_WIDTH))
    np.testing.assert_array_equal(narrow_states(wide), states)


def test_a_single_state_works_too():
    state = np.arange(45.0)
    np.testing.assert_array_equal(narrow_states(widen_states(state)), state)


@pytest.mark.parametrize("column", [3, 44])
def test_a_nan_that_is_not_filling_stays(column):
    states = np.zeros((3, 45))
    states[1, column] = np.nan
    assert narrow_states(widen_states(states)).shape == (3, 45)
