"""Agents: policies that live in time and in the environment's units."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from mail_agents.acting import Acting, TaskEmbedder
from mail_agents.config import AgentConfig
from mail_agents.data.dataset import TrajectoryDataset
from mail_agents.data.segments import SegmentSpec
from mail_agents.data.stats import FeatureStats
from mail_agents.data.windows import WindowSpec
from mail_agents.errors import InvalidInputError, MissingStatisticsError, unknown_name
from mail_agents.features import FeatureSpec
from mail_agents.normalize import Normalizer
from mail_agents.ops.backends import recording_backends
from mail_agents.policy import Policy, resolve_device
from mail_agents.seeding import derive_seed
from mail_agents.training.ema import EMA
from mail_agents.training.optim import build_optimizer, build_scheduler

__all__ = ["Agent", "TaskEmbedder"]


class Agent(Acting):
    """A policy with history, chunk queue, normalisation, units, device and random streams.

    Subclasses implement :meth:`build_policy`; the methods under "what a subclass may change", here
    and in :class:`~mail_agents.acting.Acting`, have defaults that do nothing. Life of an agent::

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
        InvalidInputError: The features or the padding do not suit this agent.
    """

    #: Values of ``config.padding`` that this agent can be trained with.
    paddings: ClassVar[tuple[str, ...]] = ("edge", "none")

    def __init__(
        self,
        config: AgentConfig,
        features: FeatureSpec,
        *,
        agent_id: str = "",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if config.padding not in self.paddings:
            raise InvalidInputError(
                f"{type(self).__name__} cannot use padding={config.padding!r}; valid here: "
                f"{', '.join(map(repr, self.paddings))}."
            )
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
            {"action": _action_normalizer(config, features)}
            | {
                f"obs/{key}": Normalizer(config.state_norm, feature.shape)
                for key, feature in features.of_kind("state", "scalar").items()
            }
        ).to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "model"))
            self.policy = self.build_policy().to(self.device)
        #: What :meth:`loss` calls: the policy, or what wraps it to train in several processes.
        self.training_module: nn.Module = self.policy
        self.ema = EMA(self.policy, config.ema_decay) if config.ema_decay is not None else None
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(derive_seed(seed, "train"))
        self._optimizer: torch.optim.Optimizer | None = None
        self._scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self.updates = 0

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

    # ---- what a subclass may change -----------------------------------------------------------

    @property
    def window_spec(self) -> WindowSpec | SegmentSpec:
        """The windows, or segments of trajectories, that this agent trains on."""
        config, keys = self.config, tuple(sorted(self.features.observations))
        padding = cast(Literal["edge", "none"], config.padding)
        return WindowSpec(config.history, config.horizon, padding, keys)

    def training_episodes(
        self, dataset: TrajectoryDataset, episodes: Sequence[int] | None = None
    ) -> list[int]:
        """Chooses the episodes to learn from, all of those given by default.

        Statistics (:meth:`fit_statistics`) and training windows come from these episodes only.

        Args:
            dataset: The dataset.
            episodes: The training part of it, or None for all.
        """
        return list(range(len(dataset)) if episodes is None else episodes)

    def check_episode_length(self, steps: int) -> None:
        """Refuses worlds whose episodes are too long to act in; asked before training.

        Args:
            steps: Longest episode of a world.

        Raises:
            InvalidInputError: The agent cannot act for so many steps.
        """

    def caveats(self) -> list[str]:
        """Sentences that a reader of this agent's results must know; reports show them."""
        return []

    def on_update(self) -> None:
        """Called after every optimiser step, when :attr:`updates` has counted it."""

    def extra_training_state(self) -> dict[str, Any]:
        """What the next update depends on besides weights, optimiser and random streams.

        Returns:
            Tensors, numbers, text, and lists and dictionaries of these: the checkpoint is read
            without unpickling.
        """
        return {}

    def load_extra_training_state(self, state: Mapping[str, Any]) -> None:
        """Takes back :meth:`extra_training_state`, its tensors on the CPU.

        Args:
            state: Empty for a checkpoint that was written before the agent had such state.
        """

    # ---- statistics and tasks -----------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether every normaliser that needs statistics has them."""
        return not self.missing_statistics()

    def missing_statistics(self) -> list[str]:
        """Names what must still be learnt from data before the agent can train and act.

        An agent that takes more from :meth:`fit_statistics` than its normalisers do adds it.
        """
        modules = {name: cast(Normalizer, module) for name, module in self.normalizers.items()}
        return [name for name, m in modules.items() if m.needs_statistics and not m.fitted]

    def fit_statistics(
        self, dataset: TrajectoryDataset, episodes: Sequence[int] | None = None
    ) -> None:
        """Takes normalisation statistics and task names from (the training part of) a dataset.

        Args:
            dataset: The dataset.
            episodes: The training part of it, or None for all; the statistics are those of
                :meth:`training_episodes`.

        Raises:
            FeatureMismatchError: The dataset lacks what the agent was made for.
        """
        self.features.check(dataset.features, that=f"dataset {dataset.info.name!r}")
        chosen = self.training_episodes(dataset, episodes)
        # Statistics of the whole dataset are stored with it, equal to the last bit.
        whole = chosen == list(range(len(dataset)))
        self.set_statistics(dataset.stats(None if whole else chosen), dataset.info.tasks)
        self.provenance["dataset"] = {
            "name": dataset.info.name,
            "sha256": dataset.info.sha256,
            "env_specs": dict(dataset.info.env_specs),
            "reference_scores": dict(dataset.info.reference_scores),
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
            for policy in self.policies():
                policy.set_action_bounds(*normalizer.bounds())

    def policies(self) -> list[Policy]:
        """The trained network and, where there is one, its average: what facts are given to."""
        averaged = [] if self.ema is None else [cast(Policy, self.ema.module)]
        return [self.policy, *averaged]

    def require_fitted(self) -> None:
        """Refuses to go on without statistics.

        Raises:
            MissingStatisticsError: See :meth:`missing_statistics`.
        """
        missing = self.missing_statistics()
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
            self.require_fitted()
        if (ids < 0).any():
            raise InvalidInputError(
                f"Agent {self.agent_id!r} is conditioned on language, but an episode has no task. "
                f"Known tasks: {', '.join(self.tasks)}."
            )
        return torch.from_numpy(cast(np.ndarray, self.task_embeddings)[ids]).to(self.device)

    # ---- training -----------------------------------------------------------------------------

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Moves a raw batch (numpy or torch, environment units) to the device and normalises it."""
        self.require_fitted()
        out: dict[str, Tensor] = {}
        for key, value in batch.items():
            if key == "task":
                embedded = self._embed(np.asarray(value))
                if embedded is not None:
                    out["task_emb"] = embedded
                continue
            name = "action" if key == "past_action" else key
            # Pinned memory is copied while the GPU computes; for other memory this waits.
            tensor = torch.as_tensor(value).to(self.device, non_blocking=self.device.type == "cuda")
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

    def loss_weight(self, batch: Mapping[str, Any]) -> float:
        """Number of targets that the loss of a batch is a mean over.

        Processes that train together weigh their losses with it, so that every target of the whole
        batch counts the same. Override it together with a loss that is no mean over
        ``action_mask``.

        Args:
            batch: As given to :meth:`loss`.
        """
        return float(batch["action_mask"].sum())

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
        """Clips, steps the optimiser and the schedule, updates the EMA, calls :meth:`on_update`."""
        metrics = {}
        if self.config.optim.grad_clip is not None:
            norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optim.grad_clip)
            metrics["grad_norm"] = norm.detach()
        self.optimizer.step()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update(self.policy)
        self.updates += 1
        self.on_update()
        return metrics

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


def _action_normalizer(config: AgentConfig, features: FeatureSpec) -> Normalizer:
    action = features.action
    return Normalizer(config.action_norm, action.shape, "action", (action.low, action.high))
