"""Decision Transformer, Decision Mamba and multi-grained Decision Mamba: one agent, three trunks.

Differences from the released codes, each reversed by the ``-released`` presets:

- short windows are padded behind the valid steps in training and not at all in acting, so padding
  has no influence with any trunk. The releases pad in front, with other values in training than in
  acting, which Mamba trunks take as input;
- actions are clipped to the action space before they enter the history; the releases remember the
  network's output as it is;
- norms, biases, embeddings and state-space parameters are exempt from weight decay.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from mail_agents.data.dataset import TrajectoryDataset
from mail_agents.data.segments import SegmentSpec
from mail_agents.errors import InvalidInputError, unknown_name
from mail_baselines.config import SequenceConfig
from mail_baselines.offline import OfflineAgent, by_task
from mail_baselines.sequence_policy import SequencePolicy


class SequenceAgent(OfflineAgent):
    """Acts so as to reach a target return; see :class:`~mail_agents.agent.Agent`.

    Without a target return, :meth:`reset` aims for the highest return of the task's training data.
    """

    uses_target_return: ClassVar[bool] = True
    paddings: ClassVar[tuple[str, ...]] = ("right", "left_legacy")

    config: SequenceConfig
    policy: SequencePolicy

    def build_policy(self) -> SequencePolicy:
        """Builds the network from ``self.config`` and ``self.features``."""
        return SequencePolicy(self.config, self.features)

    # ---- data ---------------------------------------------------------------------------------

    @property
    def window_spec(self) -> SegmentSpec:
        """Segments of trajectories, one per step."""
        config = self.config
        return SegmentSpec(
            length=config.history,
            keys=tuple(sorted(self.features.observations)),
            reward_mode=config.reward_mode,
            padding=cast(Literal["right", "left_legacy"], config.padding),
        )

    def fit_statistics(
        self, dataset: TrajectoryDataset, episodes: Sequence[int] | None = None
    ) -> None:
        """See :class:`~mail_agents.agent.Agent`; also learns the range of returns.

        Raises:
            FeatureMismatchError: The dataset lacks what the agent was made for.
            InvalidInputError: An episode of the dataset is longer than ``max_timestep``.
        """
        chosen = self.training_episodes(dataset, episodes)
        self.check_episode_length(int(dataset.lengths[chosen].max()))
        returns = dataset.episode_returns[chosen]
        for policy in self.policies():
            known = cast(SequencePolicy, policy)
            known.set_returns(float(np.abs(returns).max()), float(returns.max()))
        super().fit_statistics(dataset, episodes)
        # Beside the dataset's other facts: the network, one for all tasks, does not need them.
        self.provenance.pop("best_returns", None)
        if len(dataset.info.tasks) > 1:
            self.provenance["best_returns"] = best_returns(dataset, chosen)

    def missing_statistics(self) -> list[str]:
        """See :class:`~mail_agents.agent.Agent`; returns belong to them."""
        return super().missing_statistics() + ([] if self.policy.best is not None else ["return"])

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See :class:`~mail_agents.agent.Agent`.

        Raises:
            InvalidInputError: A time step has no embedding.
        """
        self._check_timestep(int(batch["timestep"].max()))
        return super().prepare(batch)

    def check_episode_length(self, steps: int) -> None:
        """See :class:`~mail_agents.agent.Agent`; every step needs a row of the table of times."""
        self._check_timestep(steps - 1)

    def _check_timestep(self, timestep: int) -> None:
        limit = self.config.max_timestep
        if timestep >= limit:
            raise InvalidInputError(
                f"Time step {timestep} (counted from 0) has no embedding: max_timestep is {limit}. "
                "Train with max_timestep of at least the longest episode, of the data and of the "
                "environments to act in (--config.max-timestep)."
            )

    def caveats(self) -> list[str]:
        """See :class:`~mail_agents.agent.Agent`; a trunk that looks ahead has one."""
        return [*super().caveats(), *getattr(self.policy.trunk, "caveats", ())]

    # ---- acting -------------------------------------------------------------------------------

    @property
    def remembers_planned(self) -> bool:
        """See :class:`~mail_agents.acting.Acting`; the released codes do."""
        return self.config.padding == "left_legacy"

    def resolve_target(self, target: float | None, task: str | None = None) -> float | None:
        """Returns the target, or the highest return of the task's training data if none is given.

        Args:
            target: As given, in units of the environment's rewards, or None.
            task: Task of the episode; needed where the training data had several, whose returns
                may differ in scale.

        Raises:
            MissingStatisticsError: No target is given, and the agent has seen no data.
            UnknownNameError: No target is given, and the task is none of several trained on.
        """
        if target is not None:
            return target
        self.require_fitted()
        best = self.provenance.get("best_returns")
        if not best:
            return self.policy.best
        if task not in best:
            raise unknown_name(
                "task",
                str(task),
                best,
                f"Agent {self.agent_id!r} was trained on several tasks and aims for the best "
                "return of the one it plays: name it, agent.reset(task=...) or "
                "evaluate(..., task=...), or give a target return.",
            )
        return best[task]

    def step(
        self,
        reward: np.ndarray | float,
        terminated: np.ndarray | bool,
        truncated: np.ndarray | bool,
        *,
        slots: Sequence[int] | None = None,
    ) -> None:
        """See :class:`~mail_agents.agent.Agent`; with delayed rewards the target stays."""
        if self.config.reward_mode == "delayed":
            reward = np.zeros_like(np.atleast_1d(np.asarray(reward, np.float64)))
        super().step(reward, terminated, truncated, slots=slots)

    def visible_steps(self, valid: np.ndarray) -> np.ndarray:
        """See :class:`~mail_agents.agent.Agent`; a stream needs the newest step and its action."""
        visible = super().visible_steps(valid)
        return np.minimum(visible, 2) if self.config.acting == "stream" else visible

    def plan_chunks(
        self,
        batch: Mapping[str, Tensor],
        slots: np.ndarray,
        generators: Sequence[torch.Generator],
        deterministic: bool,
    ) -> Tensor:
        """See :class:`~mail_agents.acting.Acting`; a stream goes on from the state of its slot."""
        if self.config.acting == "window":
            return super().plan_chunks(batch, slots, generators, deterministic)
        policy, plans = cast(SequencePolicy, self.acting_policy), self.plans
        count = len(plans)
        if self._stream is None or self._stream[0] != count:
            self._stream = (count, policy.stream_memory(count + 1))
        rows = into = None
        if not np.array_equal(slots, np.arange(len(slots))):
            # Repeated rows come last, and what they lead to goes to the row behind the slots.
            kept = np.arange(len(slots)) < len(np.unique(slots))
            rows = torch.from_numpy(slots).to(self.device)
            into = torch.from_numpy(np.where(kept, slots, count)).to(self.device)
        start = bool((plans[slots] == 0).all())  # these slots start an episode, and show one step
        return policy.stream_in(batch, self._stream[1], rows, into, start)

    #: Number of slots, and the trunk's state in each of them.
    _stream: tuple[int, Any] | None = None


def best_returns(dataset: TrajectoryDataset, episodes: Sequence[int]) -> dict[str, float]:
    """Highest return of each task among some episodes; tasks without episodes are left out."""
    returns = dataset.episode_returns
    return {
        dataset.info.tasks[task]: float(returns[members].max())
        for task, members in by_task(dataset, episodes).items()
        if task >= 0
    }
