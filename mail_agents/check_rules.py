"""The rules of :func:`mail_agents.check.check_agent`, in the order in which a reader wants them.

Each rule is a function that returns when the agent conforms, raises :class:`Violation` when it
does not, and raises :class:`NotApplicable` when there is nothing to check.
"""

import copy
import inspect
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mail_agents.agent import Agent
from mail_agents.artifact import artifact_bytes, load_agent
from mail_agents.check_subject import NotApplicable, Subject, Violation
from mail_agents.data.segments import SegmentSpec
from mail_agents.errors import MailAgentsError, MissingStatisticsError
from mail_agents.registry import AgentSpec

_TOLERANCE = 1e-4
_UPDATES = 40


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Violation(message)


def spec_round_trip(subject: Subject) -> None:
    """The spec survives JSON."""
    _require(AgentSpec.from_json(subject.spec.to_json()) == subject.spec, "JSON changes the spec")


def config_round_trip(subject: Subject) -> None:
    """The config survives JSON, and an unknown field is refused."""
    config = subject.config
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    _require(again == config, f"JSON changes the config: {again} != {config}")
    try:
        type(config).from_dict({**config.to_dict(), "no_such_field": 1})
    except MailAgentsError:
        return
    raise Violation("an unknown config field is accepted")


def missing_statistics_refused(subject: Subject) -> None:
    """Acting and training without normalisation statistics are refused."""
    agent = subject.new()
    if agent.fitted:
        raise NotApplicable("the agent needs no statistics")
    for name, call in (
        ("act", lambda: agent.act(subject.observations(1))),
        ("loss", lambda: agent.loss(subject.batch())),
    ):
        try:
            call()
        except MissingStatisticsError:
            continue
        raise Violation(f"{name} works without normalisation statistics")


def act_contract(subject: Subject) -> None:
    """Acting gives finite actions of the right shape, type and range, and changes nothing else."""
    agent = subject.agent()
    observation = subject.observations(3)
    before = copy.deepcopy(observation)
    rng_before = torch.get_rng_state()
    agent.policy.train()
    subject.begin(agent, 3)
    action = agent.act(observation)
    feature = subject.features.action
    _require(agent.policy.training, "act leaves the policy in evaluation mode")
    _require(torch.equal(rng_before, torch.get_rng_state()), "act uses the global random stream")
    _require(
        all(np.array_equal(before[key], observation[key]) for key in before),
        "act modifies its observation",
    )
    _require(action.shape == (3, *feature.shape), f"act returns {action.shape} for three slots")
    _require(action.dtype == np.dtype(feature.dtype), f"act returns {action.dtype}")
    _require(bool(np.isfinite(action).all()), "act returns NaN or infinity")
    if feature.low is not None and feature.high is not None:
        inside = (action >= np.array(feature.low)) & (action <= np.array(feature.high))
        _require(bool(inside.all()), "act leaves the action space")


def acts_unbatched(subject: Subject) -> None:
    """A single observation gives a single action."""
    agent = subject.agent()
    single = {key: value[0] for key, value in subject.observations(1).items()}
    agent.reset(seed=0, task="task-0", **subject.goal(agent))
    action = agent.act(single)
    _require(action.shape == subject.features.action.shape, f"one observation gives {action.shape}")


def _rollout(subject: Subject, agent: Agent, steps: int, **kwargs: Any) -> np.ndarray:
    return np.stack([agent.act(subject.observations(2, seed=t), **kwargs) for t in range(steps)])


def same_seed_same_actions(subject: Subject) -> None:
    """The same seed gives the same actions."""
    agent, steps = subject.agent(), 2 * subject.config.executed + 1
    for deterministic in (True, False):
        runs = []
        for _ in range(2):
            subject.begin(agent, 2, seed=5)
            runs.append(_rollout(subject, agent, steps, deterministic=deterministic))
        _require(np.array_equal(*runs), f"same seed, other actions ({deterministic=})")


def deterministic_flag(subject: Subject) -> None:
    """deterministic=True does not depend on the seed."""
    agent = subject.agent()
    runs = []
    for seed in (5, 6):
        subject.begin(agent, 2, seed=seed)
        runs.append(_rollout(subject, agent, 2, deterministic=True))
    _require(np.array_equal(*runs), "deterministic=True depends on the seed")


def slots_independent(subject: Subject) -> None:
    """Three slots together act like each of them alone."""
    agent, steps = subject.agent(), subject.config.executed + 1
    stream = [subject.observations(3, seed=t) for t in range(steps)]
    subject.begin(agent, 3)
    together = np.stack([agent.act(obs, deterministic=False) for obs in stream])
    for slot in range(3):
        agent.reset()
        subject.start(agent, [0], [slot])
        alone = np.stack(
            [
                agent.act({k: v[slot : slot + 1] for k, v in obs.items()}, deterministic=False)[0]
                for obs in stream
            ]
        )
        error = float(np.abs(alone - together[:, slot]).max())
        _require(
            error < _TOLERANCE, f"slot {slot} of three differs from the same slot alone: {error}"
        )


def partial_reset(subject: Subject) -> None:
    """Resetting one slot leaves the others alone."""
    agent = subject.agent()
    steps = subject.config.executed + 1
    stream = [subject.observations(2, seed=t) for t in range(steps)]

    def run(reset: bool) -> np.ndarray:
        subject.begin(agent, 2)
        actions = []
        for t, obs in enumerate(stream):
            if reset and t == 1:
                subject.start(agent, [1], [99])
            actions.append(agent.act(obs, deterministic=False)[0])
        return np.stack(actions)

    error = float(np.abs(run(reset=True) - run(reset=False)).max())
    _require(error < _TOLERANCE, f"resetting slot 1 changes slot 0 by {error}")


def episodes_forgotten(subject: Subject) -> None:
    """The same episode played twice in one slot gives the same actions."""
    agent, steps = subject.agent(), 2 * subject.config.executed + 1
    subject.begin(agent, 2)
    runs = []
    for number in range(2):
        if number:  # the whole slots stay as they are: only what an episode resets is reset
            subject.start(agent, [0, 1], [0, 1])
        runs.append(_rollout(subject, agent, steps, deterministic=False))
    error = float(np.abs(runs[0] - runs[1]).max())
    _require(error < _TOLERANCE, f"playing an episode again changes its actions by {error}")


def plans_every_executed_chunk(subject: Subject) -> None:
    """A plan is made exactly when the executed part of the last one is used up."""
    agent, executed = subject.agent(), subject.config.executed
    subject.begin(agent, 2)
    _rollout(subject, agent, 2 * executed + 1)
    _require(agent.plans.tolist() == [3, 3], f"{agent.plans.tolist()} plans, expected 3 per slot")


def past_actions_ignore_future(subject: Subject) -> None:
    """Later observations do not change earlier actions."""
    agent, steps = subject.agent(), subject.config.executed + 1  # the last step plans
    runs = []
    for later in (0, 1000):
        subject.begin(agent, 2)
        stream = [subject.observations(2, seed=t + later * (t >= steps - 1)) for t in range(steps)]
        runs.append(np.stack([agent.act(obs) for obs in stream])[: steps - 1])
    _require(np.array_equal(*runs), "a later observation changes earlier actions")


def target_return_matters(subject: Subject) -> None:
    """Another target return gives other actions."""
    agent = subject.agent()
    if not agent.uses_target_return:
        raise NotApplicable("the agent does not use target returns")
    runs = []
    for target in (subject.target, -subject.target):
        subject.begin(agent, 2, target=target)
        runs.append(_rollout(subject, agent, 1))
    _require(not np.array_equal(*runs), "opposite target returns give the same actions")


def _policy_loss(agent: Agent, batch: Mapping[str, Any]) -> float:
    agent.policy.eval()  # dropout off: only the data may make a difference
    agent.generator.manual_seed(0)
    with torch.no_grad():
        return float(agent.loss(batch)[0])


def _policy_actions(agent: Agent, batch: Mapping[str, Any]) -> torch.Tensor:
    prepared = agent.prepare(batch)
    generators = [torch.Generator().manual_seed(row) for row in range(len(batch["mask"]))]
    with agent.acting():
        return agent.acting_policy.sample(prepared, generators, True)


def _noise(values: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    if values.dtype == np.uint8:
        return rng.integers(0, 256, values.shape, dtype=np.uint8)
    return (3.0 * rng.standard_normal(values.shape)).astype(values.dtype)


def padded_history_ignored(subject: Subject) -> None:
    """What stands in padded history does not matter."""
    agent = subject.agent()
    segments = isinstance(agent.window_spec, SegmentSpec)
    batch = subject.padded_batch() if segments else subject.batch()
    if batch["mask"].all():
        raise NotApplicable("windows have no padded history")
    changed = dict(batch)
    for key in subject.features.observations:
        values = batch[f"obs/{key}"].copy()
        values[~batch["mask"]] = _noise(values)[~batch["mask"]]
        changed[f"obs/{key}"] = values
    first, second = _policy_loss(agent, batch), _policy_loss(agent, changed)
    _require(abs(first - second) < _TOLERANCE, "padded history changes the loss")
    if segments:  # their padding lies in the future, which does not exist in acting
        return
    error = float((_policy_actions(agent, batch) - _policy_actions(agent, changed)).abs().max())
    _require(error < _TOLERANCE, "padded history changes the actions")


def padded_targets_ignored(subject: Subject) -> None:
    """What stands in padded targets does not matter."""
    agent, batch = subject.agent(), subject.padded_batch()
    mask = batch["action_mask"]
    if mask.all():
        raise NotApplicable("windows have no padded targets")
    changed = dict(batch) | {"action": np.where(mask[..., None], batch["action"], np.float32(9.0))}
    first, second = _policy_loss(agent, batch), _policy_loss(agent, changed)
    _require(abs(first - second) < _TOLERANCE, "padded targets change the loss")


def trains(subject: Subject) -> None:
    """The loss falls on eight repeated windows and gradients reach every parameter."""
    if subject.untrained:
        raise NotApplicable("the agent has no trainable parameters")
    # A warm-up may be longer than this check; the rates of its first updates change nothing.
    agent, batch = subject.trainable({"optim.warmup_steps": 0}), subject.batch()
    agent.configure_optim(total_steps=_UPDATES)
    reached: set[str] = set()
    losses = []
    for _ in range(_UPDATES):
        losses.append(agent.update(batch)["loss"])
        for name, parameter in agent.policy.named_parameters():
            if parameter.grad is not None and bool(parameter.grad.abs().sum() > 0):
                reached.add(name)
    trainable = {name for name, p in agent.policy.named_parameters() if p.requires_grad}
    _require(reached == trainable, f"no gradient reaches {sorted(trainable - reached)[:5]}")
    head, tail = float(np.mean(losses[:5])), float(np.mean(losses[-5:]))
    _require(tail < head, f"loss went from {head:.4f} to {tail:.4f} on eight repeated windows")


def save_and_load(subject: Subject) -> None:
    """A saved and loaded agent acts the same, and saving is reproducible."""
    agent = subject.agent()
    _require(artifact_bytes(agent) == artifact_bytes(agent), "saving twice gives other bytes")
    with tempfile.TemporaryDirectory() as directory:
        loaded = load_agent(agent.save(Path(directory) / "agent.safetensors"), device="cpu")
    _require(loaded.config == agent.config, "loading changes the config")
    _require(loaded.features == agent.features, "loading changes the features")
    runs = []
    for each in (agent, loaded):
        subject.begin(each, 2)
        runs.append(_rollout(subject, each, 2, deterministic=False))
    _require(np.array_equal(*runs), "the loaded agent acts differently")


def other_device(subject: Subject) -> None:
    """Actions agree between CPU and CUDA."""
    if not torch.cuda.is_available():
        raise NotApplicable("no CUDA device here")
    agent = subject.agent()
    with tempfile.TemporaryDirectory() as directory:
        loaded = load_agent(agent.save(Path(directory) / "agent.safetensors"), device="cuda")
    runs = []
    for each in (agent, loaded):
        subject.begin(each, 2)
        runs.append(_rollout(subject, each, 2))
    error = float(np.abs(runs[0] - runs[1]).max())
    _require(error < 1e-2, f"CPU and CUDA actions differ by {error}")


def policy_copies(subject: Subject) -> None:
    """The policy can be deep-copied."""
    policy = subject.agent().policy
    clone = copy.deepcopy(policy)
    same = [
        torch.equal(a, b)
        for a, b in zip(policy.state_dict().values(), clone.state_dict().values(), strict=True)
    ]
    _require(all(same), "a deep copy of the policy has other weights")


def bfloat16_autocast(subject: Subject) -> None:
    """The loss is finite under bfloat16 autocast."""
    if subject.untrained:
        raise NotApplicable("the agent has no trainable parameters")
    agent = subject.agent()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        loss = agent.loss(subject.batch())[0]
    _require(bool(torch.isfinite(loss)), "the loss is not finite under bfloat16 autocast")


def _is_plain_mixer(module: torch.nn.Module) -> bool:
    """Whether a module has steps and reads one sequence (decoder attention reads a memory too)."""
    arguments = list(inspect.signature(module.forward).parameters)
    return (
        getattr(module, "causal", False)
        and arguments == ["x", "mask"]
        and hasattr(module, "d_model")
    )


def mixers_step_like_forward(subject: Subject) -> None:
    """Recurrent steps of every causal mixer agree with its parallel form."""
    policy = subject.agent().policy.eval()
    mixers: dict[type, Any] = {type(m): m for m in policy.modules() if _is_plain_mixer(m)}
    if not mixers:
        raise NotApplicable("the policy has no causal mixer")
    generator = torch.Generator().manual_seed(0)
    for kind, mixer in mixers.items():
        x = torch.randn(2, 6, mixer.d_model, generator=generator)
        with torch.no_grad():
            full = mixer(x)
            state, outputs = mixer.init_state(2), []
            for t in range(x.shape[1]):
                y, state = mixer.step(x[:, t], state)
                outputs.append(y)
        error = float((torch.stack(outputs, dim=1) - full).abs().max())
        _require(error < _TOLERANCE, f"{kind.__name__}.step differs from forward by {error}")


RULES: tuple[Callable[[Subject], None], ...] = (
    spec_round_trip,
    config_round_trip,
    missing_statistics_refused,
    act_contract,
    acts_unbatched,
    same_seed_same_actions,
    deterministic_flag,
    slots_independent,
    partial_reset,
    episodes_forgotten,
    plans_every_executed_chunk,
    past_actions_ignore_future,
    target_return_matters,
    padded_history_ignored,
    padded_targets_ignored,
    mixers_step_like_forward,
    policy_copies,
    save_and_load,
    bfloat16_autocast,
    trains,
    other_device,
)
