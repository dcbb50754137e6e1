"""Normalisers invert, agree with their bounds, survive constants, and refuse to guess."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mail_agents.data.stats import FeatureStats, feature_stats
from mail_agents.errors import FeatureMismatchError, InvalidInputError, MissingStatisticsError
from mail_agents.normalize import Normalizer

MODES = ("mean_std", "min_max", "quantile", "identity")


def statistics(array: np.ndarray) -> FeatureStats:
    return feature_stats(array, np.arange(len(array)), "state")


@pytest.fixture
def data() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(500, 4)) * [1, 10, 0.01, 1] + [0, 100, -3, 5]


@pytest.mark.parametrize("mode", MODES)
def test_inverse_undoes_scaling(mode, data):
    normalizer = Normalizer(mode, (4,)).fit(statistics(data))
    x = torch.tensor(data, dtype=torch.float32).reshape(50, 10, 4)
    torch.testing.assert_close(normalizer.inverse(normalizer(x)), x, rtol=1e-5, atol=1e-5)


def test_modes_mean_what_they_say(data):
    x = torch.tensor(data)
    found = Normalizer("mean_std", (4,)).fit(statistics(data))(x)
    torch.testing.assert_close(found.mean(0), torch.zeros(4, dtype=x.dtype), rtol=0, atol=1e-4)
    population = found.std(0, correction=0)
    torch.testing.assert_close(population, torch.ones(4, dtype=x.dtype), rtol=1e-4, atol=0)
    found = Normalizer("min_max", (4,)).fit(statistics(data))(x)
    torch.testing.assert_close(found.amin(0), -torch.ones(4, dtype=x.dtype), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.amax(0), torch.ones(4, dtype=x.dtype), rtol=0, atol=1e-4)
    found = Normalizer("quantile", (4,)).fit(statistics(data))(x)
    inside = (found.abs() <= 1 + 1e-4).double().mean(0)
    torch.testing.assert_close(inside, torch.full((4,), 0.98, dtype=x.dtype), rtol=0, atol=1e-6)
    assert found.abs().max() > 1, "nothing is clipped"


@pytest.mark.parametrize("mode", MODES)
def test_bounds_are_the_scaled_extremes(mode, data):
    normalizer = Normalizer(mode, (4,)).fit(statistics(data))
    x = normalizer(torch.tensor(data, dtype=torch.float32))
    low, high = normalizer.bounds()
    torch.testing.assert_close(low, x.amin(0), rtol=0, atol=0)
    torch.testing.assert_close(high, x.amax(0), rtol=0, atol=0)


@settings(max_examples=60)
@given(
    value=st.floats(-1e6, 1e6, width=32),
    mode=st.sampled_from(["mean_std", "min_max", "quantile"]),
    noise=st.sampled_from([0.0, 1e-9]),
)
def test_constant_dimensions_stay_finite_and_map_to_zero(value, mode, noise):
    data = np.full((20, 2), value)
    data[:, 1] = np.arange(20)
    data[0, 0] += noise * value  # rounding, not signal
    normalizer = Normalizer(mode, (2,)).fit(statistics(data))
    x = torch.tensor(data[1:], dtype=torch.float32)
    scaled = normalizer(x)
    assert torch.isfinite(scaled).all()
    assert scaled[:, 0].abs().max() <= 1e-6 * max(1.0, abs(value))
    torch.testing.assert_close(normalizer.inverse(scaled), x, rtol=1e-6, atol=1e-5)
    assert torch.isfinite(torch.stack(normalizer.bounds())).all()


def test_small_but_real_signals_are_scaled():
    data = np.linspace(0, 1e-7, 11)[:, None]
    found = Normalizer("min_max", (1,)).fit(statistics(data))(torch.tensor(data))
    torch.testing.assert_close(found[:, 0], torch.linspace(-1, 1, 11, dtype=torch.float64))


def test_image_channels_broadcast():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
    stats = feature_stats(images, np.arange(6), "image")
    found = Normalizer("mean_std", (3,)).fit(stats)(torch.tensor(images))
    assert found.dtype == torch.float32
    assert found.shape == images.shape
    assert abs(float(found.mean())) < 1e-5


def test_missing_statistics_are_an_error_that_says_what_to_do():
    normalizer = Normalizer("mean_std", (3,), name="state")
    assert not normalizer.fitted
    x = torch.zeros(2, 3)
    for use in (lambda: normalizer(x), lambda: normalizer.inverse(x), normalizer.bounds):
        with pytest.raises(
            MissingStatisticsError, match=r"'state'.*\(3,\).*statistics missing.*fit"
        ):
            use()
    identity = Normalizer("identity", (3,))
    assert identity(x) is x
    with pytest.raises(MissingStatisticsError):
        identity.bounds()


def test_statistics_travel_in_the_state_dict(data):
    fitted = Normalizer("min_max", (4,)).fit(statistics(data))
    loaded = torch.nn.ModuleDict({"a": Normalizer("min_max", (4,))})
    loaded.load_state_dict({f"a.{k}": v for k, v in fitted.state_dict().items()})
    x = torch.tensor(data, dtype=torch.float32)
    assert loaded["a"].fitted
    assert torch.equal(loaded["a"](x), fitted(x))
    loaded.load_state_dict(
        {f"a.{k}": v for k, v in Normalizer("min_max", (4,)).state_dict().items()}
    )
    assert not loaded["a"].fitted, "an artifact without statistics must not pass for fitted"


def test_wrong_shapes_modes_and_values_are_refused(data):
    with pytest.raises(FeatureMismatchError, match=r"shape \(4,\), expected \(3,\)"):
        Normalizer("mean_std", (3,)).fit(statistics(data))
    with pytest.raises(InvalidInputError, match=r"'zscore' is unknown.*mean_std"):
        Normalizer("zscore", (3,))  # type: ignore[arg-type]
    bad = statistics(data)
    bad.mean[0] = np.nan
    with pytest.raises(InvalidInputError, match="NaN"):
        Normalizer("mean_std", (4,)).fit(bad)


def test_copies_keep_working(data):
    import copy

    normalizer = copy.deepcopy(Normalizer("mean_std", (4,)).fit(statistics(data)))
    assert torch.isfinite(normalizer(torch.zeros(4))).all()


# ---- the box of a space ----------------------------------------------------------------------


@settings(deadline=None)
@given(
    low=st.floats(-100, 100, width=32),
    width=st.floats(2**-6, 100, width=32),
    value=st.floats(0, 1, width=32),
)
def test_the_box_of_a_space_becomes_minus_one_to_one(low, width, value):
    high = low + width
    normalizer = Normalizer("bounds", (2,), box=((low, -1.0), (high, 1.0)))
    assert not normalizer.needs_statistics
    corners = torch.tensor([[low, -1.0], [high, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(normalizer(corners), expected, rtol=0, atol=1e-3)
    x = torch.tensor([[low + value * width, value]], dtype=torch.float32)
    torch.testing.assert_close(normalizer.inverse(normalizer(x)), x, rtol=1e-5, atol=1e-4)


def test_a_box_of_minus_one_to_one_changes_no_bit():
    normalizer = Normalizer("bounds", (3,), box=((-1.0,) * 3, (1.0,) * 3))
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normalizer(x), x)
    assert torch.equal(normalizer.inverse(x), x)


def test_the_box_does_not_depend_on_the_data_but_the_bounds_do(data):
    normalizer = Normalizer("bounds", (4,), box=((-2.0,) * 4, (2.0,) * 4))
    with pytest.raises(MissingStatisticsError):
        normalizer.bounds()
    normalizer.fit(statistics(data))
    assert torch.equal(normalizer(torch.full((4,), 2.0)), torch.ones(4))
    low, high = normalizer.bounds()
    torch.testing.assert_close(low, torch.tensor(data.min(0) / 2, dtype=torch.float32))
    torch.testing.assert_close(high, torch.tensor(data.max(0) / 2, dtype=torch.float32))
    # A value that cannot move maps to zero and back.
    still = Normalizer("bounds", (1,), box=((3.0,), (3.0,)))
    assert still(torch.tensor([3.0])).item() == 0
    assert still.inverse(torch.tensor([0.0])).item() == 3


def test_box_normalisers_are_loaded_with_their_box():
    normalizer = Normalizer("bounds", (1,), box=((0.0,), (4.0,)))
    other = Normalizer("bounds", (1,), box=((-1.0,), (1.0,)))
    other.load_state_dict(normalizer.state_dict())
    assert other(torch.tensor([4.0])).item() == 1


@pytest.mark.parametrize(
    "box", [(None, None), ((-1.0,), None), ((-np.inf,), (1.0,)), ((1.0,), (-1.0,))]
)
def test_a_box_must_be_finite(box):
    with pytest.raises(InvalidInputError, match=r"'act'.*finite.*'min_max'"):
        Normalizer("bounds", (1,), "act", box)
