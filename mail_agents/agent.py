"""Agents: policies that live in time and in the environment's units."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from mail_agents.config import AgentConfig
from mail_agents.data.dataset import TrajectoryDataset
from mail_agents.data.stats import FeatureStats
from mail_agents.data.windows import WindowSpec
from mail_agents.errors import InvalidInputError, MissingStatisticsError, unknown_name
from mail_agents.features import FeatureSpec
from mail_agents.normalize import Normalizer
from mail_agents.ops.backends import recording_backends
from mail_agents.policy import Policy, resolve_device
from mail_agents.seeding import derive_seed
from mail_agents.slots import Slots, per_slot
from mail_agents.training.ema import EMA
from mail_agents.training.optim import build_optimizer, build_scheduler

TaskEmbedder = Callable[[Sequence[str]], np.ndarray]


class Agent(ABC):
    """A policy with history, chunk queue, normalisation, units, device and random streams.

    Subclasses implement :meth:`build_policy`. Life of an agent::

        agent = mail_agents.make("mail/ed-ma-bc", dataset.features, seed=0)
        agent.fit_statistics(dataset)
        agent.configure_optim()
        metrics = agent.update(batch)                     # batch from dataset.windows(...)

        agent.reset(task="reach-v3")
        action = agent.act(observation)                   # raw environment units in and out
        agent.step(reward, terminated, truncated)

    Args:
        config: Typed configuration.
        features: What the agent sees and does, in environment units.
        agent_id: Registry id, stored in artifacts.
        device: ``"auto"`` or a torch device name.
        seed: Root seed of weights, training noise and acting noise.

    Raises:
        InvalidInputError: The features do not suit this agent.
    """

    #: Whether the agent needs a target return to act (return-conditioned agents).
    uses_target_return: ClassVar[bool] = False

    def __init__(
        self,
        config: AgentConfig,
        features: FeatureSpec,
        *,
        agent_id: str = "",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        self.config = config
        self.features = features
        self.agent_id = agent_id
        self.seed = seed
        self.device = resolve_device(device)
        self.tasks: tuple[str, ...] = ()
        self.task_embeddings: np.ndarray | None = None
        self.provenance: dict[str, Any] = {}
        #: Kernel backends that this agent's network ran on, by op.
        self.backends: dict[str, set[str]] = {}
        self.check_features(features)
        self.normalizers = nn.ModuleDict(
            {"action": Normalizer(config.action_norm, features.action.shape)}
            | {
                f"obs/{key}": Normalizer(config.state_norm, feature.shape)
                for key, feature in features.of_kind("state", "scalar").items()
            }
        ).to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "model"))
            self.policy = self.build_policy().to(self.device)
        #: What :meth:`loss` calls: the policy, or a DDP wrapper that a script puts here.
        self.training_module: nn.Module = self.policy
        self.ema = EMA(self.policy, config.ema_decay) if config.ema_decay is not None else None
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(derive_seed(seed, "train"))
        self._optimizer: torch.optim.Optimizer | None = None
        self._scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self.updates = 0
        #: Network calls while acting are topped up to a multiple of this many rows.
        self.plan_rows = 1
        self._slots: Slots | None = None
        self._resets = 0
        self._pending: dict[str, Any] = {}

    # ---- what a subclass provides -------------------------------------------------------------

    @abstractmethod
    def build_policy(self) -> Policy:
        """Builds the network from ``self.config`` and ``self.features``."""

    def task_embedder(self) -> TaskEmbedder | None:
        """Returns ``texts -> (n, E) float32`` for language-conditioned agents, else None."""
        return None

    def check_features(self, features: FeatureSpec) -> None:
        """Refuses features that this agent cannot use; continuous vector actions by default."""
        action = features.action
        if action.n is not None or len(action.shape) != 1 or not action.dtype.startswith("float"):
            raise InvalidInputError(
                f"{type(self).__name__} needs continuous actions of shape (A,), got "
                f"{action.dtype} {action.shape}"
                + (f" with {action.n} values" if action.n is not None else "")
                + ". Discrete actions are not supported by this agent."
            )

    # ---- statistics and tasks -----------------------------------------------------------------

    @property
    def window_spec(self) -> WindowSpec:
        """The windows this agent trains on."""
        config, keys = self.config, tuple(sorted(self.features.observations))
        return WindowSpec(config.history, config.horizon, config.padding, keys)

    @property
    def fitted(self) -> bool:
        """Whether every normaliser that needs statistics has them."""
        return not self._unfitted()

    def _unfitted(self) -> list[str]:
        modules = {name: cast(Normalizer, module) for name, module in self.normalizers.items()}
        return [name for name, m in modules.items() if m.mode != "identity" and not m.fitted]

    def fit_statistics(
        self, dataset: TrajectoryDataset, episodes: Sequence[int] | None = None
    ) -> None:
        """Takes normalisation statistics and task names from (the training part of) a dataset.

        Raises:
            FeatureMismatchError: The dataset lacks what the agent was made for.
        """
        self.features.check(dataset.features, that=f"dataset {dataset.info.name!r}")
        self.set_statistics(dataset.stats(episodes), dataset.info.tasks)
        self.provenance["dataset"] = {
            "name": dataset.info.name,
            "sha256": dataset.info.sha256,
            "env_specs": dict(dataset.info.env_specs),
        }

    def set_statistics(self, stats: Mapping[str, FeatureStats], tasks: Sequence[str] = ()) -> None:
        """Sets normalisation statistics by key (``"action"`` and observation keys) and task names.

        Raises:
            UnknownNameError: Statistics for a key are missing.
        """
        for name, module in self.normalizers.items():
            key = name.removeprefix("obs/")
            if key not in stats:
                raise unknown_name("statistics key", key, stats)
            cast(Normalizer, module).fit(stats[key])
        self.tasks = tuple(tasks)
        embedder = self.task_embedder()
        if embedder is not None:
            if not self.tasks:
                raise InvalidInputError(
                    f"Agent {self.agent_id!r} is conditioned on language, but the dataset names no "
                    "tasks. Record episodes with a task, or use language='none'."
                )
            self.task_embeddings = np.asarray(embedder(self.tasks), np.float32)
        self.on_statistics()

    def on_statistics(self) -> None:
        """Passes what the policy needs to know about units; called after fitting and loading."""
        normalizer = cast(Normalizer, self.normalizers["action"])
        if normalizer.fitted:
            for policy in self._policies():
                policy.set_action_bounds(*normalizer.bounds())

    def _policies(self) -> list[Policy]:
        averaged = [] if self.ema is None else [cast(Policy, self.ema.module)]
        return [self.policy, *averaged]

    def _require_fitted(self) -> None:
        missing = self._unfitted()
        if missing:
            raise MissingStatisticsError(
                f"Agent {self.agent_id!r} has no normalisation statistics for {missing}. Call "
                "agent.fit_statistics(dataset) before training, or load a trained artifact with "
                "mail_agents.load(path)."
            )

    def _embed(self, ids: np.ndarray) -> Tensor | None:
        if self.task_embedder() is None:
            return None
        if self.task_embeddings is None:
            self._require_fitted()
        if (ids < 0).any():
            raise InvalidInputError(
                f"Agent {self.agent_id!r} is conditioned on language, but an episode has no task. "
                f"Known tasks: {', '.join(self.tasks)}."
            )
        return torch.from_numpy(cast(np.ndarray, self.task_embeddings)[ids]).to(self.device)

    # ---- training -----------------------------------------------------------------------------

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Moves a raw batch (numpy or torch, environment units) to the device and normalises it."""
        self._require_fitted()
        out: dict[str, Tensor] = {}
        for key, value in batch.items():
            if key == "task":
                embedded = self._embed(np.asarray(value))
                if embedded is not None:
                    out["task_emb"] = embedded
                continue
            name = "action" if key == "past_action" else key
            tensor = torch.as_tensor(value).to(self.device)
            if name in self.normalizers:
                tensor = self.normalizers[name](tensor.float())
            elif (
                key.startswith("obs/")
                and key.removeprefix("obs/") not in self.features.observations
            ):
                continue
            out[key] = tensor
        return out

    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the training loss of a raw batch; pure but for the training random stream.

        Args:
            batch: As given by ``dataset.windows(agent.window_spec)``.

        Raises:
            MissingStatisticsError: Statistics were never fitted.
        """
        with recording_backends(self.backends):
            return self.training_module(self.prepare(batch), self.generator)

    def configure_optim(self, total_steps: int | None = None) -> None:
        """Creates optimiser and learning-rate schedule from the config.

        Args:
            total_steps: Length of the run; needed by the cosine schedule.
        """
        self._optimizer = build_optimizer(self.policy, self.config.optim)
        self._scheduler = build_scheduler(self._optimizer, self.config.optim, total_steps)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser.

        Raises:
            InvalidInputError: :meth:`configure_optim` was not called.
        """
        if self._optimizer is None:
            raise InvalidInputError("Call agent.configure_optim() before training.")
        return self._optimizer

    @property
    def scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning-rate schedule; like :attr:`optimizer`."""
        if self._scheduler is None:
            raise InvalidInputError("Call agent.configure_optim() before training.")
        return self._scheduler

    def update(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """One optimisation step: loss, backward, clip, step, schedule, EMA.

        Returns:
            Scalars to log: ``loss``, ``grad_norm`` when clipping, and the policy's own.

        Raises:
            InvalidInputError: :meth:`configure_optim` was not called, or the loss is not finite.
        """
        optimizer = self.optimizer
        self.policy.train()
        loss, metrics = self.loss(batch)
        if not torch.isfinite(loss):
            raise InvalidInputError(
                f"The loss became {float(loss.detach())} at update {self.updates}. Lower optim.lr "
                "or set optim.grad_clip; the weights and the last checkpoint are intact."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics = dict(metrics) | {"loss": loss.detach()} | self.apply_gradients()
        return {key: float(value) for key, value in metrics.items()}

    def apply_gradients(self) -> dict[str, Tensor]:
        """Clips, steps the optimiser and the schedule, and updates the EMA."""
        metrics = {}
        if self.config.optim.grad_clip is not None:
            norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optim.grad_clip)
            metrics["grad_norm"] = norm.detach()
        self.optimizer.step()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.policy)
        self.updates += 1
        return metrics

    # ---- acting -------------------------------------------------------------------------------

    @property
    def acting_policy(self) -> Policy:
        """The network that acts: the averaged weights where there is an EMA, else the raw ones."""
        return self.policy if self.ema is None else cast(Policy, self.ema.module)

    def reset(
        self,
        slots: Sequence[int] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        task: str | Sequence[str | None] | None = None,
        target_return: float | Sequence[float] | None = None,
    ) -> None:
        """Starts new episodes.

        Args:
            slots: Slots to restart; None restarts all (their number follows from the next
                observation).
            seed: Seed of the acting noise: one per slot, or one integer from which each slot
                derives its own. None continues the agent's own sequence.
            task: Task name for all slots, or one per slot. May be left out when the agent knows
                a single task or none.
            target_return: Return to aim for, for return-conditioned agents; one or one per slot.

        Raises:
            UnknownNameError: A language-conditioned agent was not trained on the task.
            InvalidInputError: A sequence does not have one entry per slot.
        """
        self._resets += 1
        arguments = {"seed": seed, "task": task, "target_return": target_return}
        if slots is None:
            self._slots, self._pending = None, arguments
            return
        slots = list(slots)
        if self._slots is None:
            self._slots = Slots(max(slots, default=-1) + 1, self.config, self.features)
        if slots and not 0 <= min(slots) <= max(slots) < self._slots.n:
            raise InvalidInputError(
                f"Slots {slots} are outside 0..{self._slots.n - 1}; call agent.reset() to change "
                "the number of slots."
            )
        self._reset_slots(self._slots, slots, arguments)

    def _reset_slots(self, state: Slots, slots: list[int], arguments: Mapping[str, Any]) -> None:
        seed = arguments["seed"]
        if seed is None:
            seed = derive_seed(self.seed, "eval", self._resets)
        if isinstance(seed, (int, np.integer)):
            seeds = [derive_seed(int(seed), "model", slot) for slot in slots]
        else:
            seeds = [int(value) for value in per_slot("seed", seed, slots)]
        tasks = [self._resolve_task(task) for task in per_slot("task", arguments["task"], slots)]
        targets = per_slot("target_return", arguments["target_return"], slots)
        state.reset(slots, seeds, tasks, targets)

    def _resolve_task(self, task: str | None) -> str | None:
        if self.task_embedder() is None:
            return task
        if task is None and len(self.tasks) == 1:
            return self.tasks[0]
        if task not in self.tasks:
            raise unknown_name(
                "task",
                str(task),
                self.tasks,
                "This agent is conditioned on language: call agent.reset(task=...) with a task it "
                "was trained on.",
            )
        return task

    def act(
        self,
        observation: Any,
        *,
        deterministic: bool = True,
        slots: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Chooses actions from raw observations.

        Args:
            observation: ``{key: (B, ...)}`` with one row per slot (a bare array stands for the key
                ``"state"``). A single unbatched observation is also accepted. Never modified.
            deterministic: Whether to leave out sampling noise.
            slots: Slots that the rows belong to; None means all, in order.

        Returns:
            Actions ``(B, *A)`` in environment units, inside the action bounds (unbatched when the
            observation was).

        Raises:
            InvalidInputError: A key is missing, a shape is wrong, or a value is NaN or infinite.
            MissingStatisticsError: The agent was neither trained nor loaded.
        """
        self._require_fitted()
        rows, single = self.features.rows(observation)
        batch_size = len(next(iter(rows.values())))
        if self._slots is None:
            count = batch_size if slots is None else max(slots) + 1
            pending = self._pending or {"seed": None, "task": None, "target_return": None}
            self._slots = Slots(count, self.config, self.features)
            self._reset_slots(self._slots, list(range(count)), pending)
        state = self._slots
        index = state.rows(slots)
        if len(index) != batch_size:
            raise InvalidInputError(
                f"act: got {batch_size} observations for {len(index)} slots. Call agent.reset() "
                "when the number of environments changes."
            )
        state.push(index, rows)
        due = index[state.queue_position[index] >= state.executed]
        if len(due):
            chunks = self._plan(state, due, deterministic)
            state.store_plan(due, self.features.action.clip(chunks))
        action = state.pop(index).astype(self.features.action.dtype)
        return action[0] if single else action

    def _plan(self, state: Slots, due: np.ndarray, deterministic: bool) -> np.ndarray:
        """Plans chunks ``(len(due), J, *A)`` in environment units."""
        length = np.full(len(due), self.config.history)
        if self.config.padding == "none":
            # Legacy releases show the network only the frames that exist.
            length = state.valid[due].sum(axis=1)
        chunks = np.empty((len(due), *state.queue.shape[1:]), np.float32)
        with self.acting():
            for count in np.unique(length):
                rows = np.flatnonzero(length == count)
                chunks[rows] = self._sample(state, due[rows], int(count), deterministic)
        if not np.isfinite(chunks).all():
            raise InvalidInputError(
                f"Agent {self.agent_id!r} planned a NaN or infinite action; its weights are broken."
            )
        return chunks

    def _sample(
        self, state: Slots, slots: np.ndarray, count: int, deterministic: bool
    ) -> np.ndarray:
        """Plans for slots that show the policy ``count`` steps, ``(len(slots), J, *A)``."""
        extra = -len(slots) % self.plan_rows
        wide = np.concatenate([slots, np.repeat(slots[-1:], extra)])
        generators = [state.generators[slot] for slot in slots]
        generators += [torch.Generator() for _ in range(extra)]
        batch = self.prepare(self._acting_batch(state, wide, count))
        chunk = self.acting_policy.sample(batch, generators, deterministic)
        expected = (len(wide), *state.queue.shape[1:])
        if chunk.shape != expected:
            raise InvalidInputError(
                f"The policy of agent {self.agent_id!r} planned {tuple(chunk.shape)}, expected "
                f"(rows, horizon, actions) {expected}."
            )
        units = cast(Normalizer, self.normalizers["action"]).inverse(chunk[: len(slots)])
        return units.float().cpu().numpy()

    def _acting_batch(self, state: Slots, slots: np.ndarray, count: int) -> dict[str, Any]:
        batch: dict[str, Any] = {
            f"obs/{key}": buffer[slots, -count:] for key, buffer in state.observations.items()
        }
        batch["mask"] = state.valid[slots, -count:]
        batch["rtg"] = state.rtg[slots, -count:]
        batch["timestep"] = state.timestep[slots, -count:]
        batch["past_action"] = state.past_action[slots, state.past_action.shape[1] - count + 1 :]
        if self.task_embedder() is not None:
            batch["task"] = np.array([self.tasks.index(str(state.tasks[slot])) for slot in slots])
        return batch

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Evaluation and inference mode inside, the previous mode restored after."""
        policy = self.acting_policy
        training = policy.training
        policy.eval()
        try:
            with torch.inference_mode(), recording_backends(self.backends):
                yield
        finally:
            policy.train(training)

    def step(
        self,
        reward: np.ndarray | float,
        terminated: np.ndarray | bool,
        truncated: np.ndarray | bool,
        *,
        slots: Sequence[int] | None = None,
    ) -> None:
        """Tells the agent what the environment answered; lowers the return-to-go, ends episodes.

        Args:
            reward: ``(B,)`` or a number.
            terminated: ``(B,)`` or a bool.
            truncated: ``(B,)`` or a bool.
            slots: Slots that the rows belong to; None means all.
        """
        if self._slots is None:
            raise InvalidInputError("agent.step() before agent.act(); call act(observation) first.")
        index = self._slots.rows(slots)
        ended = np.atleast_1d(terminated).astype(bool) | np.atleast_1d(truncated).astype(bool)
        self._slots.advance(index, np.atleast_1d(np.asarray(reward, np.float64)), ended)

    @property
    def plans(self) -> np.ndarray:
        """Plans made in the current episode of each slot, ``(n_slots,)``."""
        return np.zeros(0, np.int64) if self._slots is None else self._slots.plans.copy()

    # ---- files --------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors artifact that is enough to act; see :mod:`.checkpoint`."""
        from mail_agents.checkpoint import save_agent

        return save_agent(self, path)

    @classmethod
    def load(cls, path: str | Path, **kwargs: Any) -> Self:
        """Loads an artifact; see :func:`mail_agents.checkpoint.load_agent`.

        Raises:
            InvalidInputError: The artifact holds another class of agent.
        """
        from mail_agents.checkpoint import load_agent

        agent = load_agent(path, **kwargs)
        if not isinstance(agent, cls):
            raise InvalidInputError(
                f"{path} holds a {type(agent).__name__}, not a {cls.__name__}; "
                "use mail_agents.load(path)."
            )
        return agent
