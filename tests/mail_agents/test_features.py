import copy
import json
import pickle

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st

from mail_agents.errors import FeatureMismatchError, InvalidInputError, UnknownNameError
from mail_agents.features import Feature, FeatureSpec, ImageSpace, as_mapping, flatten


def box(*shape, low=-1.0, high=1.0, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


SPACE = spaces.Dict(
    {
        "arm": spaces.Dict({"joints": box(7, dtype=np.float64), "gripper": box()}),
        "camera": spaces.Box(0, 255, (8, 9, 3), np.uint8),
        "mode": spaces.Discrete(4),
        "flags": spaces.MultiBinary(3),
        "goal": spaces.Text(10),
        "pair": spaces.Tuple((box(2), spaces.MultiDiscrete([2, 3]))),
        "free": box(2, low=-np.inf, high=np.inf),
    }
)


def test_from_spaces_describes_every_leaf():
    spec = FeatureSpec.from_spaces(SPACE, box(3))
    found = {key: (f.kind, f.shape, f.dtype, f.n) for key, f in spec.observations.items()}
    assert found == {
        "arm/joints": ("state", (7,), "float64", None),
        "arm/gripper": ("scalar", (), "float32", None),
        "camera": ("image", (8, 9, 3), "uint8", None),
        "mode": ("scalar", (), "int64", 4),
        "flags": ("state", (3,), "int8", None),
        "goal": ("text", (), "str", None),
        "pair/0": ("state", (2,), "float32", None),
        "pair/1": ("state", (2,), "int64", None),
        "free": ("state", (2,), "float32", None),
    }
    assert spec.observations["pair/1"].high == (1.0, 2.0)
    assert spec.observations["free"].low is None
    assert spec.observations["camera"].low is None  # always 0..255: not worth 200 numbers
    assert (spec.action.low, spec.action.high) == ((-1.0,) * 3, (1.0,) * 3)
    assert list(spec.of_kind("state", "scalar")) == sorted(
        ["arm/joints", "arm/gripper", "mode", "flags", "pair/0", "pair/1", "free"]
    )


def test_round_trip_through_json():
    spec = FeatureSpec.from_spaces(SPACE, box(3))
    assert FeatureSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_flatten_and_as_mapping():
    observation = {"a": {"b": [1, 2]}, "c": (3, {"d": 4})}
    assert flatten(observation) == {"a/b": [1, 2], "c/0": 3, "c/1/d": 4}
    assert list(as_mapping(np.zeros(2))) == ["state"]
    mapped = as_mapping(observation)
    assert mapped["a/b"].tolist() == [1, 2]


def test_a_space_observation_has_the_keys_of_its_space():
    sample = SPACE.sample()
    assert set(as_mapping(sample)) == set(FeatureSpec.from_spaces(SPACE, box(1)).observations)


@pytest.mark.parametrize("space", [spaces.Graph(box(1), None), spaces.Sequence(box(1))])
def test_unsupported_spaces_say_what_is_supported(space):
    with pytest.raises(InvalidInputError, match=r"Graph|Sequence") as caught:
        FeatureSpec.from_spaces(spaces.Dict({"x": space}), box(1))
    assert "Box, Discrete" in str(caught.value)


def test_empty_and_unknown_kinds_refused():
    with pytest.raises(InvalidInputError, match="at least one"):
        FeatureSpec({}, Feature("state", (1,), "float32"))
    with pytest.raises(InvalidInputError, match="'video'"):
        Feature("video", (1,), "float32")  # type: ignore[arg-type]


def test_from_array_tells_images_from_states():
    assert Feature.from_array(np.zeros((5, 8, 8, 3), np.uint8)).kind == "image"
    assert Feature.from_array(np.zeros((5, 8, 8, 3), np.float32)).kind == "state"
    assert Feature.from_array(np.zeros(5)).kind == "scalar"
    assert Feature.from_array(np.array(["a", "b"])) == Feature("text", (), "str")
    assert Feature.from_array(np.zeros((4, 5, 6)), leading=2).shape == (6,)
    assert Feature("state", (2, 3), "float32").size == 6
    assert Feature("scalar", (), "float32").size == 1


def spec_of(action=None, **observations):
    return FeatureSpec(observations, action or Feature("state", (2,), "float32"))


A, B = Feature("state", (3,), "float32"), Feature("state", (4,), "float32")


def test_check_accepts_what_is_enough():
    spec_of(a=A).check(spec_of(a=A, extra=B))
    spec_of(a=A).check(spec_of(a=Feature("state", (3,), "float64")))
    bounded = Feature("state", (2,), "float32", low=(-1.0,) * 2, high=(1.0,) * 2)
    spec_of(a=A).check(spec_of(action=bounded, a=A))  # bounds known on one side only


def test_check_lists_every_difference_and_what_to_do():
    wide = Feature("state", (2,), "float32", low=(-2.0, -1.0), high=(1.0, 1.0))
    narrow = Feature("state", (2,), "float32", low=(-1.0, -1.0), high=(1.0, 1.0))
    with pytest.raises(FeatureMismatchError) as caught:
        spec_of(action=narrow, a=A, b=B).check(spec_of(action=wide, a=B, c=A), that="world 'w'")
    message = str(caught.value)
    for part in (
        "agent and the world 'w' disagree",
        "'a': expected state (3,), found state (4,)",
        "'b' is missing (present: a, c)",
        "action bounds",
        "(-2.0, -1.0)",
        "mail-agents data convert",
    ):
        assert part in message


def test_check_action_shape_and_count():
    discrete = Feature("scalar", (), "int64", n=4)
    with pytest.raises(FeatureMismatchError, match="n=4"):
        spec_of(a=A).check(spec_of(action=discrete, a=A))


def test_an_image_is_not_a_state():
    image = Feature("image", (3,), "uint8")
    assert spec_of(a=A).differences(spec_of(a=image)) == [
        "observation 'a': expected state (3,), found image (3,)"
    ]


@given(
    st.dictionaries(
        st.text("abc/", min_size=1, max_size=4),
        st.tuples(st.sampled_from(["state", "scalar", "text"]), st.lists(st.integers(1, 4))),
        min_size=1,
        max_size=4,
    )
)
def test_a_spec_never_differs_from_its_round_trip(observations):
    spec = spec_of(
        **{
            key: Feature(kind, tuple(shape), "float32")
            for key, (kind, shape) in observations.items()
        }
    )
    again = FeatureSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert spec.differences(again) == []


def test_select_keeps_the_named_keys() -> None:
    box = spaces.Box(-1, 1, (2,), np.float32)
    both = FeatureSpec.from_spaces(spaces.Dict({"a": box, "b": box}), box)
    assert list(both.select(["b"]).observations) == ["b"]
    assert both.select(()) == both
    with pytest.raises(UnknownNameError, match=r"'c'.*Valid: a, b"):
        both.select(["c"])


def test_a_discrete_space_may_start_elsewhere() -> None:
    box = spaces.Box(-1, 1, (2,), np.float32)
    action = FeatureSpec.from_spaces(box, spaces.Discrete(3, start=5)).action
    assert (action.n, action.low, action.high) == (3, (5.0,), (7.0,))


def image_spec(orientation):
    return FeatureSpec.from_spaces(
        spaces.Dict({"camera": ImageSpace((8, 9, 3), orientation)}), box(3)
    )


@pytest.mark.parametrize("orientation", ["raw", "upright", "rot180", None])
def test_orientation_travels_with_the_schema(orientation):
    space = copy.deepcopy(pickle.loads(pickle.dumps(ImageSpace((8, 9, 3), orientation))))
    assert space.orientation == orientation
    assert space.contains(np.zeros((8, 9, 3), np.uint8))
    spec = image_spec(orientation)
    assert spec.observations["camera"] == Feature(
        "image", (8, 9, 3), "uint8", orientation=orientation
    )
    assert FeatureSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_orientations_differ_only_when_both_are_stated():
    image_spec("raw").check(image_spec("raw"))
    image_spec("raw").check(image_spec(None))
    image_spec(None).check(image_spec("upright"))
    with pytest.raises(FeatureMismatchError, match="expected orientation raw, found upright"):
        image_spec("raw").check(image_spec("upright"))


def test_unknown_and_misplaced_orientations_are_refused():
    with pytest.raises(InvalidInputError, match=r"'flipped' is not one of raw, upright, rot180"):
        ImageSpace((8, 9, 3), "flipped")
    with pytest.raises(InvalidInputError, match="only images have one"):
        Feature("state", (3,), "float32", orientation="raw")


def test_image_spaces_that_are_turned_differently_differ() -> None:
    raw, upright = ImageSpace((8, 9, 3), "raw"), ImageSpace((8, 9, 3), "upright")
    assert raw == ImageSpace((8, 9, 3), "raw")
    assert raw != upright
    plain = spaces.Box(0, 255, (8, 9, 3), np.uint8)
    assert plain != raw
    assert plain == ImageSpace((8, 9, 3))
    batch = batch_space(spaces.Dict({"camera": raw}), 4)["camera"]
    assert batch == ImageSpace((4, 8, 9, 3), "raw")
    assert batch.orientation == "raw"
