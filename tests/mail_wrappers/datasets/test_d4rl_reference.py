import pytest

from mail_agents.errors import UnknownNameError
from mail_wrappers.datasets.d4rl_reference import domain_of, domains, reference

# Normalised scores of known returns, to six decimals.
KNOWN = [
    ("hopper", 0.0, 0.622887),
    ("hopper", 1800.0, 55.929693),
    ("hopper", 2260.1983114487352, 70.069748),
    ("hopper", 3600.0, 111.236499),
    ("hopper", 3624.4696022560997, 111.988353),
    ("halfcheetah", 0.0, 2.256745),
    ("halfcheetah", 3985.8150261686337, 34.361115),
    ("halfcheetah", 6000.0, 50.584683),
    ("halfcheetah", 12000.0, 98.912621),
    ("halfcheetah", 12330.945945279545, 101.578277),
    ("walker2d", 0.0, -0.035485),
    ("walker2d", 2500.0, 54.422785),
    ("walker2d", 2760.3310101980005, 60.093655),
    ("walker2d", 5000.0, 108.881055),
    ("ant", 0.0, 7.742611),
    ("pen", 0.0, -3.229677),
    ("hammer", 0.0, 2.103120),
    ("door", 0.0, 1.924115),
    ("relocate", 0.0, 0.151544),
    ("kitchen", 2.5, 62.5),
    ("antmaze", 0.53, 53.0),
]


def score(domain, value):
    pair = reference(domain)
    return 100 * (value - pair["min"]) / (pair["max"] - pair["min"])


@pytest.mark.parametrize(("domain", "value", "expected"), KNOWN)
def test_known_returns_give_known_scores(domain, value, expected):
    assert score(domain, value) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("domain", domains())
def test_midpoint_is_fifty(domain):
    pair = reference(domain)
    assert score(domain, (pair["min"] + pair["max"]) / 2) == pytest.approx(50.0)
    assert pair["source"] == f"d4rl:{domain}"


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("umaze", (23.85, 161.86)),
        ("medium", (13.13, 277.39)),
        ("large", (6.7, 273.99)),
        ("umaze-dense", (68.537689, 193.66285642381482)),
        ("medium-dense", (44.264742, 297.4552547777125)),
        ("large-dense", (30.569041, 303.4857382709002)),
    ],
)
def test_every_maze_has_its_own_pair(low, high):
    pair = reference(f"maze2d-{low}-v1")
    assert (pair["min"], pair["max"]) == high


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("hopper", "hopper"),
        ("hopper-medium-v2", "hopper"),
        ("hopper-medium-expert-v0", "hopper"),
        ("ant-full-replay-v1", "ant"),
        ("walker2d-medium-replay", "walker2d"),
        ("antmaze-large-diverse-v2", "antmaze"),
        ("kitchen-partial-v0", "kitchen"),
        ("relocate-cloned-v1", "relocate"),
        ("maze2d-umaze", "maze2d-umaze"),
        ("maze2d-umaze-dense-v1", "maze2d-umaze-dense"),
    ],
)
def test_datasets_belong_to_domains(name, domain):
    assert domain_of(name) == domain


@pytest.mark.parametrize(
    "name",
    ["Hopper-v5", "hopper-v5", "hopper-medium-v5", "hopper-v2", "humanoid-medium-v2", "", "maze2d",
     "maze2d-umaze-v2", "antmaze-umaze-v1", "kitchen-complete-v1", "hopper-medium-v2\n"],
)  # fmt: skip
def test_other_environments_borrow_nothing(name):
    with pytest.raises(UnknownNameError, match="D4RL dataset"):
        reference(name)


def test_a_typo_is_corrected():
    with pytest.raises(UnknownNameError, match="Did you mean 'hopper-medium-v2'"):
        reference("hoper-medium-v2")
