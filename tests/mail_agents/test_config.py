import dataclasses
import json
import math
from dataclasses import dataclass, field

import pytest

from mail_agents.agents.mail_config import MailConfig
from mail_agents.config import AgentConfig, OptimConfig, parse_agent
from mail_agents.errors import InvalidInputError, UnknownNameError


@dataclass(frozen=True)
class Inner:
    layers: int = 1
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Config(AgentConfig):
    inner: Inner = field(default_factory=Inner)


def test_round_trip_through_json():
    config = Config(history=3, horizon=4, execute=2, inner=Inner(5, (7,)), ema_decay=0.5)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.inner.sizes, tuple)
    assert isinstance(again.optim.betas, tuple)


def test_partial_dictionaries_take_defaults():
    assert Config.from_dict({"history": 2}) == Config(history=2)


@pytest.mark.parametrize(("before", "now"), [(True, "all"), (False, "matrices")])
def test_configs_of_earlier_versions_are_read(before, now):
    old = Config().to_dict()
    del old["optim"]["decayed"]
    old["optim"]["decay_all"] = before
    assert Config.from_dict(old) == Config().replace({"optim.decayed": now})
    assert "decay_all" in old["optim"]  # what was given stays as it was


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().history = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"histroy": 1}, UnknownNameError, ["'histroy'", "Config", "Did you mean 'history'?"]),
        ({"inner": {"layer": 1}}, UnknownNameError, ["'layer'", "'layers'"]),
        ({"history": 1.5}, InvalidInputError, ["history", "1.5"]),
        ({"history": "2"}, InvalidInputError, ["history"]),
        ({"padding": "zero"}, InvalidInputError, ["padding", "zero"]),
        ({"optim": {"lr": "fast"}}, InvalidInputError, ["lr"]),
        ({"inner": 3}, InvalidInputError, ["inner"]),
        ({"inner": {"sizes": ["a"]}}, InvalidInputError, ["sizes"]),
    ],
)
def test_wrong_keys_and_types_are_named(data, error, words):
    for build in (Config.from_dict, Config().replace):
        with pytest.raises(error) as caught:
            build(data)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {"history": 0},
        {"horizon": 0},
        {"horizon": 4, "execute": 5},
        {"execute": 0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"ema_decay": math.nan},
    ],
)
def test_agent_ranges(data):
    with pytest.raises(InvalidInputError):
        AgentConfig(**data)


@pytest.mark.parametrize(
    "data",
    [
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"weight_decay": math.nan},
        {"grad_clip": 0.0},
        {"grad_clip": math.nan},
        {"warmup_steps": -1},
        {"batch_size": 0},
    ],
)
def test_optim_ranges(data):
    with pytest.raises(InvalidInputError):
        OptimConfig(**data)


def test_executed_defaults_to_the_whole_chunk():
    assert AgentConfig(horizon=4).executed == 4
    assert AgentConfig(horizon=4, execute=2).executed == 2


def test_replace_by_dotted_and_nested_names():
    config = Config().replace({"inner.layers": 3, "optim": {"lr": 1e-3}, "history": 2})
    assert config.inner == Inner(layers=3)
    assert config.optim == OptimConfig(lr=1e-3)
    assert config.history == 2
    assert Config().replace({"inner": Inner(9)}).inner.layers == 9
    assert Config().replace({"inner.sizes": (4,)}).inner.sizes == (4,)
    assert Config().replace({}) == Config()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"inner.layrs": 1}, ["'layrs'", "Did you mean 'layers'?", "inner.layrs"]),
        ({"iner.layers": 1}, ["'iner'", "Did you mean 'inner'?"]),
        ({"inner": {"layrs": 1}}, ["'layrs'", "Did you mean 'layers'?"]),
    ],
)
def test_replace_names_what_does_not_exist(overrides, words):
    with pytest.raises(UnknownNameError) as caught:
        Config().replace(overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"decoder.mixer": "mamba3"},
            ["'mamba3' for decoder.mixer", "Did you mean 'mamba", "mamba2, bimamba, hydra, att"],
        ),
        ({"encoder": {"mixer": "hidra"}}, ["for encoder.mixer", "Did you mean 'hydra'?"]),
        ({"objective": 5}, ["5 for objective", "Valid: bc, ddpm"]),
        ({"width": "wide"}, ['"width"', '"int"', '"wide"']),
    ],
)
def test_choices_that_do_not_exist_are_answered_with_those_that_do(overrides, words):
    with pytest.raises(InvalidInputError) as caught:
        MailConfig().replace(overrides)
    for word in words:
        assert word in str(caught.value)


def test_replace_cannot_reach_into_plain_fields():
    with pytest.raises(InvalidInputError, match="has no fields"):
        Config().replace({"history.deep": 1})


def test_parse_agent():
    assert parse_agent("mail/ed-ma-bc") == ("mail/ed-ma-bc", {})
    agent, overrides = parse_agent(
        'a/b, history=5,optim.lr=1e-3,language=hash,ema_decay=null,flag=true,text="5"'
    )
    assert agent == "a/b"
    assert overrides == {
        "history": 5,
        "optim.lr": 1e-3,
        "language": "hash",
        "ema_decay": None,
        "flag": True,
        "text": "5",
    }


@pytest.mark.parametrize("text", ["a,b", "a,=1", "a,"])
def test_parse_agent_refuses(text):
    with pytest.raises(InvalidInputError, match="field=value"):
        parse_agent(text)


def test_a_real_config_refuses_what_its_network_cannot_be():
    with pytest.raises(InvalidInputError, match="divisible"):
        MailConfig().replace({"encoder": {"mixer": "attention", "heads": 3}})
