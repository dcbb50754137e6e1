"""The acting half of an agent: episodes, histories, chunk queues and plans."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from mail_agents.config import AgentConfig
from mail_agents.errors import InvalidInputError, unknown_name
from mail_agents.features import FeatureSpec
from mail_agents.normalize import Normalizer
from mail_agents.ops.backends import recording_backends
from mail_agents.policy import Policy
from mail_agents.seeding import derive_seed
from mail_agents.slots import Slots, per_slot
from mail_agents.training.ema import EMA

TaskEmbedder = Callable[[Sequence[str]], np.ndarray]

# CPU matrix products of one to three rows round differently from those of four or more, whatever
# stands in the other rows. Convolutions are chosen by the exact number of rows.
_CPU_ROWS = 4
# GPU kernels of all kinds are, and rows cost next to nothing there.
_GPU_ROWS = 20


@contextmanager
def evaluating(policy: Policy) -> Iterator[None]:
    """Evaluation mode inside; after it, every module is in the mode it was in before."""
    # Asking all modules takes as long as a step of a small network, so mostly the policy answers
    # for them; Acting._settle sees to it that it can.
    trained = [each for each in policy.modules() if each.training] if policy.training else []
    if trained:
        policy.eval()
    try:
        yield
    finally:
        for each in trained:
            each.training = True


class Acting(ABC):
    """What an :class:`~mail_agents.agent.Agent` does between training runs: it acts in slots.

    The attributes below belong to the agent; see there.
    """

    #: Whether the agent needs a target return to act (return-conditioned agents).
    uses_target_return: ClassVar[bool] = False

    config: AgentConfig
    features: FeatureSpec
    agent_id: str
    device: torch.device
    seed: int
    tasks: tuple[str, ...]
    policy: Policy
    ema: EMA | None
    normalizers: nn.ModuleDict
    backends: dict[str, set[str]]

    def __init__(self) -> None:
        #: Network calls while acting are topped up to a multiple of this many rows.
        self.plan_rows = 1
        #: Whether they have exactly as many.
        self.plan_fixed = False
        self._slots: Slots | None = None
        self._resets = 0
        self._pending: dict[str, Any] = {}

    @abstractmethod
    def task_embedder(self) -> TaskEmbedder | None:
        """See :class:`~mail_agents.agent.Agent`."""

    @abstractmethod
    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See :class:`~mail_agents.agent.Agent`."""

    @abstractmethod
    def require_fitted(self) -> None:
        """See :class:`~mail_agents.agent.Agent`."""

    # ---- what a subclass may change -----------------------------------------------------------

    @property
    def remembers_planned(self) -> bool:
        """Whether past actions are shown as planned, before they were clipped to their bounds."""
        return False

    def visible_steps(self, valid: np.ndarray) -> np.ndarray:
        """How many of the newest steps the policy is shown when it plans.

        With ``padding="edge"`` (and ``"left_legacy"``) always the whole history, padded and masked
        at the start of an episode; otherwise only the steps that exist.

        Args:
            valid: ``(n, H)`` bool, the steps that hold a real observation, the newest last.

        Returns:
            ``(n,)`` numbers in 1..H. Slots that show equally many share a network call.
        """
        if self.config.padding in ("none", "right"):
            return valid.sum(axis=1)
        return np.full(len(valid), self.config.history)

    def resolve_target(self, target: float | None, task: str | None = None) -> float | None:
        """Turns the target return given to :meth:`reset` into the one to aim for.

        Return-conditioned agents choose their own when none is given.

        Args:
            target: As given, in units of the environment's rewards, or None.
            task: Task of the episode, or None where nobody named one.
        """
        return target

    def plan_chunks(
        self,
        batch: Mapping[str, Tensor],
        slots: np.ndarray,
        generators: Sequence[torch.Generator],
        deterministic: bool,
    ) -> Tensor:
        """Asks the policy for chunks; an agent that carries a network state does so here.

        Such an agent keeps one state for each of ``len(self.plans)`` slots. Slots whose
        :attr:`plans` is 0 start an episode: their state is a new one.

        Args:
            batch: Prepared batch, one row per entry of ``slots``.
            slots: ``(B,)`` slot of each row. The last slot may be there several times, see
                :attr:`plan_rows`; only its first row counts.
            generators: One random stream per row.
            deterministic: Whether to leave out sampling noise.

        Returns:
            Normalised chunks ``(B, J, A)``.
        """
        return self.acting_policy.sample(batch, generators, deterministic)

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

    def _settle(self) -> None:
        """Has parts that were added to a policy in evaluation mode, such as a new head, follow."""
        policy = self.acting_policy
        if not policy.training and any(each.training for each in policy.modules()):
            policy.eval()

    def _reset_slots(self, state: Slots, slots: list[int], arguments: Mapping[str, Any]) -> None:
        self._settle()
        seed = arguments["seed"]
        if seed is None:
            seed = derive_seed(self.seed, "eval", self._resets)
        if isinstance(seed, (int, np.integer)):
            seeds = [derive_seed(int(seed), "model", slot) for slot in slots]
        else:
            seeds = [int(value) for value in per_slot("seed", seed, slots)]
        tasks = [self._resolve_task(task) for task in per_slot("task", arguments["task"], slots)]
        given = per_slot("target_return", arguments["target_return"], slots)
        targets = [self.resolve_target(*each) for each in zip(given, tasks, strict=True)]
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
        self.require_fitted()
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
            state.store_plan(due, chunks)
        planned = state.pop(index)
        action = self.features.action.clip(planned)
        state.remember(index, planned if self.remembers_planned else action)
        action = action.astype(self.features.action.dtype)
        return action[0] if single else action

    def _plan(self, state: Slots, due: np.ndarray, deterministic: bool) -> np.ndarray:
        """Plans chunks ``(len(due), J, *A)`` in environment units."""
        length = self.visible_steps(state.valid[due])
        chunks = np.empty((len(due), *state.queue.shape[1:]), np.float32)
        with self.acting():
            for count in np.unique(length):
                alike = np.flatnonzero(length == count)
                size = self.plan_rows if self.plan_fixed else len(alike)
                for first in range(0, len(alike), size):
                    rows = alike[first : first + size]
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
        chunk = self.plan_chunks(batch, wide, generators, deterministic)
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
    def planning_alike(self) -> Iterator[None]:
        """Inside, a slot's plan is the same, bit for bit, whatever slots are planned for beside it.

        On a CPU that is tested; not so for layers of eight outputs or fewer, whose rounding may
        depend on the place of a row. On a GPU all network calls have one shape, which is what can
        be done for kernels that are chosen by it.
        """
        before = self.plan_rows, self.plan_fixed
        on_cpu = self.device.type == "cpu"
        sees = any(feature.kind == "image" for feature in self.features.observations.values())
        self.plan_rows, self.plan_fixed = (_CPU_ROWS, sees) if on_cpu else (_GPU_ROWS, True)
        self._settle()
        try:
            with evaluating(self.acting_policy):
                yield
        finally:
            self.plan_rows, self.plan_fixed = before

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Evaluation and inference mode inside, the previous mode restored after."""
        with (
            evaluating(self.acting_policy),
            torch.inference_mode(),
            recording_backends(self.backends),
        ):
            yield

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
