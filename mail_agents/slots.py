"""What an agent remembers while acting, one row ("slot") per environment."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mail_agents.config import AgentConfig
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec
from mail_agents.seeding import derive_seed


def per_slot(name: str, value: Any, slots: Sequence[int]) -> list[Any]:
    """Spreads one value over all slots, or checks that there is one per slot.

    Raises:
        InvalidInputError: A sequence does not have one entry per slot.
    """
    if value is None or isinstance(value, (str, int, float, np.integer, np.floating)):
        return [value] * len(slots)
    if len(value) != len(slots):
        raise InvalidInputError(f"reset: {name} has {len(value)} entries for {len(slots)} slots.")
    return list(value)


class Slots:
    """History, chunk queue, return-to-go, task and random stream of N independent slots.

    Every array has the slot as its first axis, so one environment and many are the same code, and
    resetting one slot leaves the others untouched. Rows of the history are ordered oldest first;
    ``valid`` marks the rows that hold a real observation.

    Args:
        n: Number of slots.
        config: Gives history, horizon and executed chunk length.
        features: Gives keys, shapes and dtypes.
    """

    def __init__(self, n: int, config: AgentConfig, features: FeatureSpec) -> None:
        history, horizon, action = config.history, config.horizon, features.action
        self.n = n
        self.executed = config.executed
        self.observations = {
            key: np.zeros((n, history, *feature.shape), feature.dtype)
            for key, feature in features.observations.items()
            if feature.kind != "text"
        }
        self.valid = np.zeros((n, history), bool)
        self.past_action = np.zeros((n, history - 1, *action.shape), np.float32)
        self.rtg = np.zeros((n, history), np.float32)
        self.timestep = np.zeros((n, history), np.int64)
        # float64, in which clipping to float64 action bounds is exact.
        self.queue = np.zeros((n, horizon, *action.shape), np.float64)
        self.queue_position = np.full(n, self.executed, np.int64)
        self.started = np.zeros(n, bool)
        self.ended = np.ones(n, bool)  # nothing runs before the first reset
        self.plans = np.zeros(n, np.int64)
        self.target_return = np.zeros(n, np.float64)
        self.steps = np.zeros(n, np.int64)
        self.tasks: list[str | None] = [None] * n
        self.generators = [torch.Generator() for _ in range(n)]

    def reset(
        self,
        slots: Sequence[int],
        seeds: Sequence[int],
        tasks: Sequence[str | None],
        target_returns: Sequence[float | None],
    ) -> None:
        """Empties the given slots and sets their random stream, task and target return."""
        for slot, seed, task, target in zip(slots, seeds, tasks, target_returns, strict=True):
            self.valid[slot] = False
            self.past_action[slot] = 0
            self.queue_position[slot] = self.executed
            self.started[slot] = False
            self.ended[slot] = False
            self.plans[slot] = 0
            self.steps[slot] = 0
            self.target_return[slot] = 0.0 if target is None else target
            self.tasks[slot] = task
            self.generators[slot].manual_seed(derive_seed(seed, "model"))

    def rows(self, slots: Sequence[int] | None) -> np.ndarray:
        """Checks a choice of slots; None means all.

        Raises:
            InvalidInputError: A slot does not exist or is named twice.
        """
        index = np.arange(self.n) if slots is None else np.asarray(slots, np.int64)
        if len(set(index.tolist())) < len(index) or not ((index >= 0) & (index < self.n)).all():
            raise InvalidInputError(
                f"Slots {index.tolist()} are not distinct numbers in 0..{self.n - 1}."
            )
        return index

    def push(self, slots: np.ndarray, observation: dict[str, np.ndarray]) -> None:
        """Appends one observation per slot; the first one of an episode fills the whole history."""
        if self.ended[slots].any():
            over = slots[self.ended[slots]].tolist()
            raise InvalidInputError(
                f"No episode runs in slots {over} (it has ended, or was never started); call "
                f"agent.reset(slots={over}) before acting."
            )
        fresh = slots[~self.started[slots]]
        for key, buffer in self.observations.items():
            buffer[slots] = np.roll(buffer[slots], -1, axis=1)
            buffer[slots, -1] = observation[key]
            # Rows before the start repeat the first frame; ``valid`` says they are padding.
            buffer[fresh] = buffer[fresh, -1][:, None]
        for buffer, value in (
            (self.valid, True),
            (self.rtg, self.target_return[slots]),
            (self.timestep, self.steps[slots]),
        ):
            buffer[slots] = np.roll(buffer[slots], -1, axis=1)
            buffer[slots, -1] = value
        for buffer in (self.rtg, self.timestep):
            buffer[fresh] = buffer[fresh, -1][:, None]
        self.started[slots] = True

    def pop(self, slots: np.ndarray) -> np.ndarray:
        """Takes the next queued action of each slot; ``(len(slots), *A)``."""
        action = self.queue[slots, self.queue_position[slots]]
        self.queue_position[slots] += 1
        return action

    def remember(self, slots: np.ndarray, action: np.ndarray) -> None:
        """Appends actions ``(len(slots), *A)`` to the past ones that the policy is shown."""
        if self.past_action.shape[1]:
            self.past_action[slots] = np.roll(self.past_action[slots], -1, axis=1)
            self.past_action[slots, -1] = action

    def store_plan(self, slots: np.ndarray, chunk: np.ndarray) -> None:
        """Puts new chunks ``(len(slots), J, *A)`` into the queues."""
        self.queue[slots] = chunk
        self.queue_position[slots] = 0
        self.plans[slots] += 1

    def advance(self, slots: np.ndarray, reward: np.ndarray, ended: np.ndarray) -> None:
        """Accounts for one environment step.

        Raises:
            InvalidInputError: There is not one reward and one end per slot.
        """
        if not len(slots) == len(reward) == len(ended):
            raise InvalidInputError(
                f"step: got {len(reward)} rewards and {len(ended)} ends for {len(slots)} slots."
            )
        self.target_return[slots] -= reward
        self.steps[slots] += 1
        self.ended[slots] |= ended
