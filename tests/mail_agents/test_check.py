"""The conformance suite catches what it is for: one broken agent per rule."""

import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from toybox.sequence import SequenceAgent, SequenceConfig, SequencePolicy

from mail_agents import check_agent, registry
from mail_agents.agent import Agent
from mail_agents.check_rules import RULES
from mail_agents.config import AgentConfig
from mail_agents.data.example import example_dataset, example_features
from mail_agents.errors import UnknownNameError
from mail_agents.features import Feature, FeatureSpec
from mail_agents.policy import Policy
from mail_agents.registry import AgentSpec, Registry


@dataclass(frozen=True)
class Config(AgentConfig):
    history: int = 3
    horizon: int = 3
    execute: int | None = 2
    width: int = 16


class GoodMixer(nn.Module):
    """A running sum; the smallest thing that has a step."""

    causal = True

    def __init__(self, d_model):
        super().__init__()
        self.d_model = d_model
        self.gain = nn.Parameter(torch.ones(d_model))

    def forward(self, x, mask=None):
        x = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
        return (self.gain * x).cumsum(dim=1)

    def init_state(self, batch_size, device=None, dtype=None):
        return torch.zeros(batch_size, self.d_model)

    def step(self, x, state):
        state = state + self.gain * x
        return state, state

    def prefill(self, x, state=None, mask=None):
        y = self.forward(x, mask)
        return y, y[:, -1]


class GoodPolicy(Policy):
    mixer_class: type[nn.Module] = GoodMixer

    def __init__(self, config, features):
        super().__init__()
        self.shape = (config.horizon, features.action.size)
        self.keys = list(features.of_kind("state"))
        inputs = sum(features.observations[key].size for key in self.keys)
        self.encoder = nn.Linear(inputs, config.width)
        self.mixer = self.mixer_class(config.width)
        self.head = nn.Linear(config.width, self.shape[0] * self.shape[1])

    def predict(self, batch):
        states = torch.cat([batch[f"obs/{key}"].flatten(2) for key in self.keys], dim=-1)
        mixed = self.mixer(torch.tanh(self.encoder(states)), batch["mask"])
        return self.head(mixed[:, -1]).unflatten(1, self.shape)

    def loss(self, batch, generator=None):
        mask = batch["action_mask"].unsqueeze(-1)
        error = torch.where(mask, self.predict(batch).float() - batch["action"], 0.0).square()
        return error.sum() / mask.sum().clamp(min=1), {}

    def sample(self, batch, generators, deterministic):
        chunk = self.predict(batch)
        if deterministic:
            return chunk
        noise = torch.stack([torch.randn(self.shape, generator=each) for each in generators])
        return chunk + 0.1 * noise


class Good(Agent):
    policy_class: type[Policy] = GoodPolicy

    def build_policy(self):
        return self.policy_class(self.config, self.features)


def broken_policy(**members):
    """An agent whose policy has other members."""
    policy = type("BrokenPolicy", (GoodPolicy,), members)
    return type("Broken", (Good,), {"policy_class": policy})


def broken_agent(**members):
    return type("Broken", (Good,), members)


# ---- what breaks each rule -------------------------------------------------------------------


class ForgetfulConfig(Config):
    def to_dict(self):
        data = super().to_dict()
        return {**data, "history": data["history"] + 1}


class TolerantConfig(Config):
    @classmethod
    def from_dict(cls, data):
        return super().from_dict({k: v for k, v in data.items() if k != "no_such_field"})


def act_then(change):
    """An agent that does something to what ``act`` returns."""
    return broken_agent(act=lambda self, obs, **kw: change(Good.act(self, obs, **kw)))


def act_on(change):
    def act(self, observation, **kwargs):
        change(observation)
        return Good.act(self, observation, **kwargs)

    return broken_agent(act=act)


def mutates(observation):
    observation["state"] += 0.01


def stays_in_evaluation(self, observation, **kwargs):
    action = Good.act(self, observation, **kwargs)
    self.policy.eval()
    return action


def global_noise(self, batch, generators, deterministic):
    return GoodPolicy.sample(self, batch, generators, deterministic) + 0 * torch.randn(())


def unseeded(self, batch, generators, deterministic):
    noise = np.random.default_rng().standard_normal()
    return GoodPolicy.sample(self, batch, generators, deterministic) + 0.1 * noise


def always_noisy(self, batch, generators, deterministic):
    return GoodPolicy.sample(self, batch, generators, False)


def across_rows(self, batch):
    chunk = GoodPolicy.predict(self, batch)
    return chunk - chunk.mean(dim=0)


def one_stream(self, batch, generators, deterministic):
    """All rows draw from the first row's generator."""
    return GoodPolicy.sample(self, batch, generators[:1] * len(generators), deterministic)


def reset_everything(self, slots=None, **kwargs):
    if slots is not None and self._slots is not None and len(slots) < self._slots.n:
        Good.reset(self, range(self._slots.n), seed=7, task="task-0")
    Good.reset(self, slots, **kwargs)


def plan_always(self, observation, **kwargs):
    if self._slots is not None:
        self._slots.queue_position[:] = self.config.horizon
    return Good.act(self, observation, **kwargs)


def reuse_buffer(self, observation, **kwargs):
    action = Good.act(self, observation, **kwargs)
    if not hasattr(self, "_buffer") or self._buffer.shape != action.shape:
        self._buffer = action
    self._buffer[:] = action
    return self._buffer


def without_mask(self, batch):
    return GoodPolicy.predict(self, {**batch, "mask": torch.ones_like(batch["mask"])})


def sample_without_mask(self, batch, generators, deterministic):
    batch = {**batch, "mask": torch.ones_like(batch["mask"])}
    return GoodPolicy.sample(self, batch, generators, deterministic)


def unmasked_loss(self, batch, generator=None):
    return (self.predict(batch).float() - batch["action"]).square().mean(), {}


class WrongStep(GoodMixer):
    def step(self, x, state):
        y, state = super().step(x, state)
        return y + 0.01, state


def unreachable(self, config, features):
    GoodPolicy.__init__(self, config, features)
    self.forgotten = nn.Linear(2, 2)


def climbs(self, batch, generator=None):
    loss = GoodPolicy.loss(self, batch)[0]
    return 2 * loss.detach() - loss, {}


def shallow(self, memo):
    return type(self)(Config(), example_features())


def float32_only(self, batch, generator=None):
    if self.predict(batch).dtype != torch.float32:
        raise TypeError("not implemented for 'BFloat16'")
    return GoodPolicy.loss(self, batch)


class Unsaved(Good):
    """Adds what it learnt from the statistics, and does not save it."""

    bonus = 0.0

    def set_statistics(self, stats, tasks=()):
        super().set_statistics(stats, tasks)
        self.bonus = 0.25

    def act(self, observation, **kwargs):
        return np.clip(super().act(observation, **kwargs) * 0.5 + self.bonus, -1, 1)


class Remembering(Good):
    """Carries something from plan to plan in each slot, by public names alone."""

    memory = None

    def fresh(self, slots):
        return slots[self.plans[slots] == 0]

    def plan_chunks(self, batch, slots, generators, deterministic):
        chunk = super().plan_chunks(batch, slots, generators, deterministic)
        if self.memory is None or len(self.memory) != len(self.plans):
            self.memory = torch.zeros(len(self.plans), *chunk.shape[1:])
        self.memory[self.fresh(slots)] = 0
        self.memory[slots] += 0.5 * chunk
        return self.memory[slots]


class Haunted(Remembering):
    """Forgets only where all slots are made anew, not with each episode."""

    def fresh(self, slots):
        return slots[:0]

    def reset(self, slots=None, **kwargs):
        super().reset(slots, **kwargs)
        if slots is None:
            self.memory = None


class Impatient(Good):
    """Makes up statistics instead of asking for them."""

    def require_fitted(self):
        for module in self.normalizers.values():
            module._fitted = True


class Aimless(SequencePolicy):
    """Does not look at the return to aim for."""

    def predict(self, batch, past_action):
        return super().predict({**batch, "rtg": 0 * batch["rtg"]}, past_action)


class Wide(SequencePolicy):
    """Reads padded steps: those after the end of an episode, in training."""

    def predict(self, batch, past_action):
        return super().predict(batch, past_action) + batch["obs/state"].mean()


class AimlessAgent(SequenceAgent):
    def build_policy(self):
        return Aimless(self.config, self.features)


class WideAgent(SequenceAgent):
    def build_policy(self):
        return Wide(self.config, self.features)


class LossySpec(AgentSpec):
    def to_json(self):
        return json.dumps({**json.loads(super().to_json()), "paper": ""})

    @classmethod
    def from_json(cls, text):
        return AgentSpec(**json.loads(text))

    def __eq__(self, other):
        return self.to_json() == other.to_json() and self.paper == other.paper

    __hash__ = None


#: Rule -> agents (or configs, or specs) that must fail it. The words are part of the message.
BROKEN = {
    "spec round trip": [(LossySpec, "JSON")],
    "config round trip": [
        (ForgetfulConfig, "JSON changes the config"),
        (TolerantConfig, "unknown config"),
    ],
    "missing statistics refused": [(Impatient, "without normalisation statistics")],
    "act contract": [
        (act_on(mutates), "modifies its observation"),
        (broken_agent(act=stays_in_evaluation), "evaluation mode"),
        (broken_policy(sample=global_noise), "global random stream"),
        (act_then(lambda action: action[..., :1]), "returns (3, 1)"),
        (act_then(lambda action: action.astype(np.float64)), "float64"),
        (act_then(lambda action: action + 5), "leaves the action space"),
        (act_then(lambda action: action * np.float32(np.nan)), "NaN"),
        (broken_policy(sample=lambda self, b, g, d: self.predict(b)[:, :, :1]), "expected (rows"),
    ],
    "acts unbatched": [(act_then(np.atleast_2d), "one observation gives (1, 3)")],
    "same seed same actions": [(broken_policy(sample=unseeded), "same seed, other actions")],
    "deterministic flag": [(broken_policy(sample=always_noisy), "depends on the seed")],
    "slots independent": [
        (broken_policy(predict=across_rows), "differs from the same slot alone"),
        (broken_policy(sample=one_stream), "differs from the same slot alone"),
    ],
    "partial reset": [(broken_agent(reset=reset_everything), "resetting slot 1 changes slot 0")],
    "episodes forgotten": [(Haunted, "playing an episode again changes its actions")],
    "plans every executed chunk": [(broken_agent(act=plan_always), "expected 3 per slot")],
    "past actions ignore future": [(broken_agent(act=reuse_buffer), "later observation")],
    "target return matters": [(AimlessAgent, "opposite target returns")],
    "padded history ignored": [
        (broken_policy(predict=without_mask), "changes the loss"),
        (broken_policy(sample=sample_without_mask), "changes the actions"),
        (WideAgent, "changes the loss"),
    ],
    "padded targets ignored": [(broken_policy(loss=unmasked_loss), "padded targets")],
    "mixers step like forward": [(broken_policy(mixer_class=WrongStep), "WrongStep.step differs")],
    "policy copies": [(broken_policy(__deepcopy__=shallow), "other weights")],
    "save and load": [(Unsaved, "acts differently")],
    "bfloat16 autocast": [(broken_policy(loss=float32_only), "BFloat16")],
    "trains": [
        (broken_policy(__init__=unreachable), "no gradient reaches ['forgotten.bias'"),
        (broken_policy(loss=climbs), "loss went from"),
    ],
}
CASES = [(rule, *case) for rule, cases in BROKEN.items() for case in cases]


@pytest.fixture
def registered(monkeypatch):
    """Registers a class under an id; saving and loading look it up by name."""
    fresh = Registry()
    monkeypatch.setattr(registry, "_registry", fresh)

    def add(found):
        kinds = {"agent": Good, "config": Config, "spec": AgentSpec}
        for kind, base in (("agent", Agent), ("config", AgentConfig), ("spec", AgentSpec)):
            if issubclass(found, base):
                kinds[kind] = found
        if issubclass(found, SequenceAgent):
            kinds["config"] = SequenceConfig
        for kind in ("agent", "config"):
            monkeypatch.setitem(globals(), f"Tested_{kind}", kinds[kind])
        spec = kinds["spec"](
            "test/agent",
            f"{__name__}:Tested_agent",
            f"{__name__}:Tested_config",
            paper="a paper",
            kwargs={"width": 12},
        )
        fresh.add(spec)
        return spec

    return add


@pytest.mark.parametrize("found", [Good, Remembering])
def test_a_good_agent_passes_everything_that_concerns_it(registered, found):
    report = check_agent(registered(found))
    assert report.ok, report
    skipped = {result.name for result in report.results if result.status == "skip"}
    assert skipped <= {"other device", "target return matters"}
    assert len(report.results) == len(RULES)


@pytest.mark.parametrize("padding", ["right", "left_legacy"])
def test_a_good_return_conditioned_agent_of_segments_passes(registered, padding):
    # Its warm-up is longer than the check.
    overrides = {"padding": padding, "optim.warmup_steps": 10_000, "optim.lr": 0.003}
    report = check_agent(registered(SequenceAgent), overrides=overrides)
    assert report.ok, report
    skipped = {result.name: result.detail for result in report.results if result.status == "skip"}
    assert "target return matters" not in skipped
    padded = {"padded history ignored", "padded targets ignored"}
    assert skipped.keys() & padded == (padded if padding == "left_legacy" else set())


def test_every_rule_has_an_agent_that_breaks_it():
    rules = {check.__name__.replace("_", " ") for check in RULES}
    assert set(BROKEN) == rules - {"other device"}  # that one needs a second device


@pytest.mark.parametrize(("rule", "found", "words"), CASES, ids=[case[0] for case in CASES])
def test_a_broken_agent_is_caught(registered, rule, found, words):
    report = check_agent(registered(found))
    failed = {result.name: result.detail for result in report.results if result.status == "fail"}
    assert rule in failed, report
    assert words in failed[rule]
    assert not report.ok
    assert "DOES NOT CONFORM" in str(report)


def test_report_as_json_and_text(registered):
    report = check_agent(registered(broken_policy(sample=always_noisy)))
    data = json.loads(report.to_json())
    assert data["agent_id"] == "test/agent"
    assert data["ok"] is False
    statuses = {row["name"]: row["status"] for row in data["results"]}
    assert statuses["deterministic flag"] == "fail"
    assert statuses["spec round trip"] == "pass"
    assert all(row["seconds"] >= 0 for row in data["results"])


def test_by_id_with_overrides_and_other_features(registered):
    registered(Good)
    wide = FeatureSpec(
        {"a": Feature("state", (2,), "float64"), "b": Feature("state", (2, 2), "float32")},
        Feature("state", (2,), "float64"),
    )
    report = check_agent("test/agent", wide, overrides={"history": 1, "horizon": 1, "execute": 1})
    assert report.ok, report
    status = {result.name: result.status for result in report.results}
    assert status["padded history ignored"] == "skip"
    assert status["padded targets ignored"] == "skip"
    with pytest.raises(UnknownNameError):
        check_agent("test/agent", overrides={"widht": 1})
    with pytest.raises(UnknownNameError):
        check_agent("test/agnet")


def test_an_agent_that_crashes_fails_instead_of_ending_the_suite(registered):
    report = check_agent(registered(broken_policy(predict=lambda self, batch: 1 / 0)))
    failed = [result for result in report.results if result.status == "fail"]
    assert len(failed) > 5
    assert any("ZeroDivisionError" in result.detail for result in failed)
    assert len(report.results) == len(RULES)


def test_images_are_part_of_the_example_data():
    features = FeatureSpec(
        {"cam": Feature("image", (4, 4, 3), "uint8"), "state": Feature("state", (2,), "float32")},
        Feature("state", (2,), "float32"),
    )
    dataset = example_dataset(features, 5)
    assert dataset.features.observations["cam"].kind == "image"
    assert dataset.info.tasks == ("task-0", "task-1")
    same = example_dataset(features, 5)
    assert copy.copy(same.info.sha256) == dataset.info.sha256
