import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_agents.data.sim_states import STATE_WIDTH, narrow_states, widen_states
from mail_agents.errors import InvalidInputError


@given(st.integers(1, 140), st.integers(1, 4))
def test_states_come_back_whole(width, rows):
    states = np.random.default_rng(width).normal(size=(rows, width))
    wide = widen_states(states)
    assert wide.shape == (rows, max(width, STATE_WIDTH))
    np.testing.assert_array_equal(narrow_states(wide), states)


@pytest.mark.parametrize("states", [np.zeros((2, 3), int), np.zeros(2), np.zeros((2, 1, 3))])
def test_other_things_than_rows_of_real_numbers_are_refused(states):
    with pytest.raises(InvalidInputError, match=rf"found {states.dtype} with shape"):
        widen_states(states)


@pytest.mark.parametrize("column", [3, 44])
def test_a_nan_that_is_not_filling_stays(column):
    states = np.zeros((3, 45))
    states[1, column] = np.nan
    assert narrow_states(widen_states(states)).shape == (3, 45)
