"""Windows: the fixed-size views of episodes that networks train on, computed and not stored."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mail_agents.data.views import (
    Batch,
    StepView,
    check_choice,
    check_count,
    episode_array,
    gather_rows,
)
from mail_agents.errors import InvalidInputError
from mail_agents.seeding import derive_seed

if TYPE_CHECKING:
    from mail_agents.data.dataset import ArrayDataset


@dataclass(frozen=True)
class WindowSpec:
    """Which steps a sample holds.

    Attributes:
        history: H, observed steps up to and including the current one.
        horizon: J, actions to predict, the first belonging to the current step.
        padding: ``"edge"`` makes every step a current step: history before the first step repeats
            the first frame, targets after the last step repeat the last action, and masks tell
            them apart. ``"none"`` keeps only windows that lie fully inside an episode, as the
            released MaIL code does; the first H-1 and the last J-1 steps are then never current.
        keys: Observation keys to read, or None for all. Leaving unused cameras out saves most of
            the reading.
    """

    history: int = 1
    horizon: int = 1
    padding: Literal["edge", "none"] = "edge"
    keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("history", "horizon"):
            check_count("WindowSpec", name, getattr(self, name))
        check_choice("WindowSpec", "padding", self.padding, ("edge", "none"))


class WindowView(StepView):
    """All windows of a dataset, gathered on demand.

    ``view[i]`` is one sample, ``view[a:b]`` and ``view[indices]`` are batches. A batch of B windows
    with current steps t holds:

    ================  =================  ======================================================
    ``obs/<key>``     ``(B, H, ...)``    observations of steps t-H+1..t, stored dtype
    ``action``        ``(B, J, *A)``     actions of steps t..t+J-1
    ``past_action``   ``(B, H-1, *A)``   actions of steps t-H+1..t-1, zero where ``mask`` is False
    ``reward``        ``(B, J)``         float32 rewards of steps t..t+J-1, zero past the end
    ``rtg``           ``(B, H)``         float32 undiscounted return from each history step on
    ``timestep``      ``(B, H)``         int64 step number in the episode
    ``mask``          ``(B, H)``         bool, history steps that exist
    ``action_mask``   ``(B, J)``         bool, targets that exist
    ``task``          ``(B,)``           int64 index into ``dataset.info.tasks``, -1 without a task
    ================  =================  ======================================================

    With ``padding="edge"`` history before the first step repeats observation, ``rtg`` and
    ``timestep`` of step 0, and targets past the end repeat the last action. The current step is
    always the last of the history, so the first target has index H-1 within the window.

    Args:
        dataset: Where the columns are.
        spec: Which steps a sample holds.
        episodes: Episode indices to draw from, or None for all.
    """

    def __init__(
        self, dataset: "ArrayDataset", spec: WindowSpec, episodes: Sequence[int] | None = None
    ) -> None:
        chosen = episode_array(episodes, len(dataset))
        lengths = dataset.lengths[chosen]
        if spec.padding == "edge":
            first, counts = 0, lengths.copy()
        else:
            first = spec.history - 1
            counts = np.maximum(lengths - (spec.history + spec.horizon - 1) + 1, 0)
            _warn_short(chosen, counts, spec)
            chosen, counts = chosen[counts > 0], counts[counts > 0]
        super().__init__(dataset, spec.keys, chosen, counts, first)
        self.spec = spec

    def _gather(self, episode: np.ndarray, step: np.ndarray) -> Batch:
        data, spec = self.dataset, self.spec
        past = step[:, None] + np.arange(1 - spec.history, 1)
        future = step[:, None] + np.arange(spec.horizon)
        length = data.lengths[episode][:, None]
        mask, action_mask = past >= 0, future < length
        past = np.maximum(past, 0)
        start = data.starts("action")[episode][:, None]
        ahead = start + np.minimum(future, length - 1)

        batch = self._observations(episode, past)
        actions = data.column("action")
        batch["action"] = gather_rows(actions, ahead)
        previous = gather_rows(actions, start + past[:, :-1])
        previous[~mask[:, :-1]] = 0
        batch["past_action"] = previous
        reward = gather_rows(data.column("reward"), ahead).astype(np.float32)
        batch["reward"] = np.where(action_mask, reward, np.float32(0))
        batch["rtg"] = gather_rows(data.returns_to_go, start + past).astype(np.float32)
        batch["timestep"] = past
        batch["mask"] = mask
        batch["action_mask"] = action_mask
        batch["task"] = data.task_ids[episode]
        return batch


def _warn_short(episodes: np.ndarray, counts: np.ndarray, spec: WindowSpec) -> None:
    short = episodes[counts == 0]
    if len(short):
        warnings.warn(
            f"{len(short)} of {len(episodes)} episodes are shorter than a window of "
            f"{spec.history + spec.horizon - 1} steps and are skipped (first: episode {short[0]}). "
            "Use padding='edge' to train on them.",
            stacklevel=4,
        )


class BatchSampler:
    """Endless batches of indices whose state is two integers.

    The order of an epoch is a function of ``(seed, epoch)`` alone. Global batch ``k`` is the same
    for every number of ranks with equal ``batch_size * world_size``; rank ``r`` takes the ``r``-th
    contiguous part of it. Every rank sees the same number of batches: an incomplete last batch is
    kept, and its samples are topped up from the start of the epoch to a multiple of
    ``world_size`` (never with one rank). :attr:`repeated` says how many of the last samples of the
    batch just given were added so; nothing is to be learnt from them again.

    Args:
        n: Number of samples.
        batch_size: Samples per batch and rank.
        seed: Root seed.
        shuffle: Whether to permute; otherwise the order is 0..n-1.
        drop_last: Whether to leave out an incomplete last batch.
        rank: Index of this process.
        world_size: Number of processes.

    Raises:
        InvalidInputError: A number is out of range, or there would be no batch at all.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if n < 1:
            raise InvalidInputError(
                "There is nothing to sample: 0 windows. Use padding='edge', a shorter window, or "
                "more episodes."
            )
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise InvalidInputError(
                f"batch_size={batch_size}, rank={rank}, world_size={world_size}: expected "
                "batch_size >= 1 and 0 <= rank < world_size."
            )
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._global = batch_size * world_size
        self.batches_per_epoch = n // self._global if drop_last else -(-n // self._global)
        if self.batches_per_epoch == 0:
            raise InvalidInputError(
                f"drop_last leaves no batch: {n} samples, {self._global} per global batch. "
                "Use a smaller batch_size or drop_last=False."
            )
        self.epoch, self.position = 0, 0
        self.repeated = 0
        self._order: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> "BatchSampler":
        return self

    def __next__(self) -> np.ndarray:
        order = self._epoch_order()
        batch = order[self.position * self._global : (self.position + 1) * self._global]
        missing = -len(batch) % self.world_size
        if missing:
            batch = np.concatenate([batch, np.resize(order, missing)])
        share = len(batch) // self.world_size
        self.repeated = min(max((self.rank + 1) * share - len(batch) + missing, 0), share)
        self.position += 1
        if self.position == self.batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        return batch[self.rank * share : (self.rank + 1) * share]

    def _epoch_order(self) -> np.ndarray:
        if self._order is None or self._order[0] != self.epoch:
            if self.shuffle:
                rng = np.random.Generator(
                    np.random.PCG64(derive_seed(self.seed, "data", self.epoch))
                )
                self._order = (self.epoch, rng.permutation(self.n))
            else:
                self._order = (self.epoch, np.arange(self.n))
        return self._order[1]

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches already given in it."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues after the last batch that was given when ``state`` was taken.

        Raises:
            InvalidInputError: The state cannot come from a sampler of this size.
        """
        if set(state) != {"epoch", "position"}:
            raise InvalidInputError(
                f"Sampler state has keys {sorted(state)}, expected epoch, position."
            )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < self.batches_per_epoch:
            raise InvalidInputError(
                f"Sampler state epoch={epoch}, position={position} does not fit "
                f"{self.batches_per_epoch} batches per epoch. Resume with the data, batch size and "
                "number of processes of the original run."
            )
        self.epoch, self.position = epoch, position
