import json
import os
import subprocess
import sys
import warnings

import pytest

import mail_agents
from mail_agents import registry
from mail_agents.agents.mail_config import MailConfig
from mail_agents.config import AgentConfig
from mail_agents.errors import InvalidInputError, MissingDependencyError, UnknownNameError
from mail_agents.features import Feature, FeatureSpec
from mail_agents.registry import AgentSpec, Registry

FEATURES = FeatureSpec(
    {"state": Feature("state", (3,), "float32")}, Feature("state", (2,), "float32")
)
MLP = {"entry_point": "toybox.agent:MlpAgent", "config_entry_point": "toybox.agent:MlpConfig"}


@pytest.fixture
def fresh(monkeypatch):
    """An empty registry that has discovered nothing yet, in place of the process-wide one."""
    found = Registry()
    monkeypatch.setattr(registry, "_registry", found)
    return found


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a package importable, with entry points as an installer would leave them."""

    def add(name, code, entry_points=""):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mail_agents.agents]\n{entry_points}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return name

    yield add
    for name in [
        n for n, m in sys.modules.items() if str(tmp_path) in str(getattr(m, "__file__", ""))
    ]:
        del sys.modules[name]


def plugin(agent_id):
    return (
        "def register_agents():\n"
        "    import mail_agents\n"
        f"    mail_agents.register({agent_id!r}, 'nowhere.{agent_id}:A', 'nowhere:C')\n"
    )


# ---- lightness --------------------------------------------------------


def test_importing_and_listing_need_no_torch():
    code = (
        "import sys, time\n"
        "began = time.process_time()\n"
        "import mail_agents\n"
        "used = time.process_time() - began\n"
        "assert 'torch' not in sys.modules, 'at import'\n"
        "ids = mail_agents.list_agents()\n"
        "mail_agents.pprint_registry()\n"
        "config = mail_agents.spec('mail/ed-ma-bc').config({'history': 2})\n"
        "assert 'torch' not in sys.modules, 'when listing'\n"
        "print(used, config.history, *ids)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mail_agents", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used, history, *ids = done.stdout.split()
    assert float(used) < 0.4  # CPU seconds: what the clock would show on a quiet machine
    assert history == "2"
    assert {"mail/ed-ma-ddpm", "random", "mean-action"} <= set(ids)


# ---- registering --------------------------------------------------------


def test_an_identical_repeat_does_nothing_and_a_clash_is_refused(fresh):
    mail_agents.register("x/a", **MLP, kwargs={"width": 4})
    mail_agents.register("x/a", **MLP, kwargs={"width": 4})
    with pytest.raises(InvalidInputError, match=r"'x/a' is already registered.*own namespace"):
        mail_agents.register("x/a", **MLP, kwargs={"width": 5})
    assert mail_agents.spec("x/a").kwargs == {"width": 4}


@pytest.mark.parametrize("bad", ["", "A/b", "a//b", "/a", "a/", "a b", "ä", "a\n", "-a", "a:b"])
def test_malformed_ids(fresh, bad):
    with pytest.raises(InvalidInputError, match="malformed"):
        mail_agents.register(bad, **MLP)


@pytest.mark.parametrize("entry", ["no_colon", "a:b:c", "", None, AgentConfig])
def test_entry_points_are_strings(fresh, entry):
    with pytest.raises(InvalidInputError, match="module:Class"):
        mail_agents.register("x/a", entry_point=entry, config_entry_point="a:b")
    with pytest.raises(InvalidInputError, match="module:Class"):
        mail_agents.register("x/a", entry_point="a:b", config_entry_point=entry)


def test_kwargs_must_be_json(fresh):
    with pytest.raises(InvalidInputError, match="JSON"):
        mail_agents.register("x/a", **MLP, kwargs={"width": object()})


def test_spec_round_trips_through_json():
    for agent_id in mail_agents.list_agents():
        found = mail_agents.spec(agent_id)
        assert AgentSpec.from_json(found.to_json()) == found
        assert json.loads(found.to_json())["id"] == agent_id
    nested = AgentSpec("a", "m:A", "m:C", frozenset("ba"), ("json",), "p", {"t": (1, {"u": (2,)})})
    assert AgentSpec.from_json(nested.to_json()) == nested


# ---- finding --------------------------------------------------------


def test_a_miss_names_the_nearest_id_and_the_next_command():
    with pytest.raises(UnknownNameError) as caught:
        mail_agents.spec("mail/ed-ma-dppm")
    message = str(caught.value)
    assert "Did you mean 'mail/ed-ma-ddpm'?" in message
    assert "mail-agents list" in message


def test_listing_by_pattern_tags_and_in_natural_order(fresh, monkeypatch):
    monkeypatch.setattr(fresh, "_discovered", True)
    for name, tags in (("x/v10", ("a",)), ("x/v9", ("a", "b")), ("x/v1", ()), ("y", ("b",))):
        mail_agents.register(name, **MLP, tags=tags)
    assert mail_agents.list_agents() == ["x/v1", "x/v9", "x/v10", "y"]
    assert mail_agents.list_agents("x/v1*") == ["x/v1", "x/v10"]
    assert mail_agents.list_agents(tags=["a"]) == ["x/v9", "x/v10"]
    assert mail_agents.list_agents(tags=["a", "b"]) == ["x/v9"]
    assert mail_agents.list_agents("X*") == []


def test_a_module_prefix_is_imported_first(fresh, install):
    name = install("prefixed", plugin("prefixed/one") + "register_agents()\n")
    assert mail_agents.spec(f"{name}:prefixed/one").id == "prefixed/one"
    with pytest.raises(MissingDependencyError, match=r"'no_such_module'.*'no_such_module:a/b'"):
        mail_agents.spec("no_such_module:a/b")


def test_missing_requirements_are_reported_and_refused(fresh):
    mail_agents.register("x/a", **MLP, requires=["json", "no_such_a", "no_such_b.part"])
    mail_agents.register("x/b", **MLP, requires=["json"])
    assert mail_agents.spec("x/b").available() == (True, "")
    assert mail_agents.list_agents("x/*", available=True) == ["x/b"]
    assert mail_agents.list_agents("x/*", available=False) == ["x/a"]
    listing = mail_agents.pprint_registry("x/*")
    assert "===== x =====" in listing
    assert "pip install no_such_a no_such_b" in listing
    with pytest.raises(MissingDependencyError, match="no_such_a, no_such_b"):
        mail_agents.make("x/a", FEATURES)


# ---- plugins --------------------------------------------------------


def test_plugins_are_discovered_on_the_first_miss_only(fresh, install):
    install("lazy_one", plugin("lazy/one"), "lazy = lazy_one:register_agents")
    mail_agents.register("x/a", **MLP)
    assert mail_agents.spec("x/a").id == "x/a"
    assert "lazy_one" not in sys.modules
    assert mail_agents.spec("lazy/one").entry_point == "nowhere.lazy/one:A"
    assert "lazy_one" in sys.modules
    assert "lazy/one" in mail_agents.list_agents("lazy/*")


def test_a_broken_plugin_is_named_while_the_others_work(fresh, install):
    install("broken_one", "raise RuntimeError('no licence')", "bad = broken_one:register_agents")
    install("gone", "", "gone = gone:no_such_function")
    install("clash", plugin("random"), "clash = clash:register_agents")
    install("good_one", plugin("good/one"), "good = good_one:register_agents")
    with pytest.warns(UserWarning, match="Agent plugin") as caught:
        ids = mail_agents.list_agents()
    assert {"good/one", "mail/ed-ma-bc", "random"} <= set(ids)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "'bad' (broken_one:register_agents)" in messages
    assert "RuntimeError: no licence" in messages
    assert set(fresh.plugin_errors) == {"bad", "gone", "clash"} or set(fresh.plugin_errors) == {
        "bad",
        "gone",
        "baselines",  # entry points have no order: whoever comes second is refused
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # reported once, not at every listing
        mail_agents.list_agents()
        problems = registry.plugin_problems()
    assert problems["bad"] == "RuntimeError: no licence"
    assert set(problems) == set(fresh.plugin_errors)
    with pytest.raises(UnknownNameError, match="no licence"):
        mail_agents.spec("bad/one")


# ---- making --------------------------------------------------------


def test_make_applies_preset_then_config_then_overrides(fresh):
    mail_agents.register("x/a", **MLP, kwargs={"width": 4, "history": 2})
    assert mail_agents.make("x/a", FEATURES).config.width == 4
    agent = mail_agents.make("x/a", FEATURES, config={"width": 5}, horizon=3)
    assert (agent.config.width, agent.config.history, agent.config.horizon) == (5, 2, 3)
    assert agent.agent_id == "x/a"
    whole = type(agent.config)(width=6)
    assert mail_agents.make("x/a", FEATURES, config=whole, horizon=2).config == whole.replace(
        {"horizon": 2}
    )
    made = mail_agents.make(mail_agents.spec("x/a"), FEATURES)
    assert made.config.width == 4


def test_make_refuses_foreign_configs_and_unknown_overrides(fresh):
    mail_agents.register("x/a", **MLP)
    with pytest.raises(InvalidInputError, match="takes a MlpConfig, got a MailConfig"):
        mail_agents.make("x/a", FEATURES, config=MailConfig())
    with pytest.raises(UnknownNameError, match=r"'widht'.*Did you mean 'width'"):
        mail_agents.make("x/a", FEATURES, widht=3)


@pytest.mark.parametrize("entry", ["no_such_module:A", "toybox.agent:NoSuchClass"])
def test_a_wrong_entry_point_shows_when_made(fresh, entry):
    mail_agents.register("x/a", entry_point=entry, config_entry_point="toybox.agent:MlpConfig")
    with pytest.raises(MissingDependencyError, match=f"Cannot load '{entry}'"):
        mail_agents.make("x/a", FEATURES)


def test_make_seeds_the_weights_and_leaves_the_global_stream_alone(fresh):
    import torch

    mail_agents.register("x/a", **MLP)
    before = torch.get_rng_state()
    first, same, other = (mail_agents.make("x/a", FEATURES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [agent.policy.net[0].weight for agent in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_make_refuses_a_device_that_is_not_there(fresh):
    mail_agents.register("x/a", **MLP)
    with pytest.raises(InvalidInputError, match=r"'warp'.*'cpu' or 'auto'"):
        mail_agents.make("x/a", FEATURES, device="warp")


def test_the_package_lists_and_loads_its_names_lazily():
    assert {"Agent", "load", "evaluate", "check_agent"} <= set(dir(mail_agents))
    assert mail_agents.WindowSpec(history=2).history == 2
    with pytest.raises(AttributeError, match="no attribute 'Agnet'"):
        _ = mail_agents.Agnet
