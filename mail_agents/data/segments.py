"""Segments: stretches of episodes for models of whole trajectories, computed and not stored.

Return-conditioned sequence models (Chen et al. 2021, arXiv:2106.01345) read K consecutive steps of
returns-to-go, states and actions and learn from every one of them. A segment starts where its
sample's step is and may reach past the end of the episode, so every step starts exactly one
segment: drawing segments uniformly is drawing trajectories by their length and starts uniformly
within them, as the released Decision Transformer code does.
"""

from collections.abc import Sequence
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

if TYPE_CHECKING:
    from mail_agents.data.dataset import ArrayDataset

#: What the released Decision Transformer code writes into the actions of padded steps.
_LEGACY_ACTION = -10


@dataclass(frozen=True)
class SegmentSpec:
    """Which steps a sample holds.

    Attributes:
        length: K, steps per segment.
        keys: Observation keys to read, or None for all.
        reward_mode: ``"dense"`` takes rewards as they are. ``"delayed"`` gives each episode its
            whole return at the last step and nothing before it (arXiv:2106.01345, section 5.4).
        padding: Where short segments are padded. ``"right"`` puts the real steps first, so that
            nothing a causal model reads at a real step is padding. ``"left_legacy"`` puts them
            last, as the released code does; models without an attention mask then read padding.
    """

    length: int = 20
    keys: tuple[str, ...] | None = None
    reward_mode: Literal["dense", "delayed"] = "dense"
    padding: Literal["right", "left_legacy"] = "right"

    def __post_init__(self) -> None:
        check_count("SegmentSpec", "length", self.length)
        check_choice("SegmentSpec", "reward_mode", self.reward_mode, ("dense", "delayed"))
        check_choice("SegmentSpec", "padding", self.padding, ("right", "left_legacy"))


class SegmentView(StepView):
    """All segments of a dataset, one per step of every episode, gathered on demand.

    ``view[i]`` is one sample, ``view[a:b]`` and ``view[indices]`` are batches. A batch of B
    segments that start at steps s of episodes of length T holds the steps s..min(s+K, T)-1:

    ================  ===============  ==========================================================
    ``obs/<key>``     ``(B, K, ...)``  observations, stored dtype
    ``action``        ``(B, K, *A)``   actions
    ``reward``        ``(B, K)``       float32 rewards
    ``rtg``           ``(B, K)``       float32 undiscounted return from each step on, its own
                                       reward included; the return of the episode if "delayed"
    ``timestep``      ``(B, K)``       int64 step number in the episode
    ``mask``          ``(B, K)``       bool, steps that exist
    ``action_mask``   ``(B, K)``       the same
    ``task``          ``(B,)``         int64 index into ``dataset.info.tasks``, -1 without a task
    ================  ===============  ==========================================================

    With ``padding="right"`` padded steps follow the real ones and repeat observation, ``rtg`` and
    ``timestep`` of the last one, with action and reward 0. With ``"left_legacy"`` they come first:
    observation 0 (before normalisation), action -10, ``rtg``, reward and ``timestep`` 0.

    Args:
        dataset: Where the columns are.
        spec: Which steps a sample holds.
        episodes: Episode indices to draw from, or None for all.

    Raises:
        UnknownNameError: An observation key does not exist.
        InvalidInputError: The choice of episodes is invalid.
    """

    def __init__(
        self, dataset: "ArrayDataset", spec: SegmentSpec, episodes: Sequence[int] | None = None
    ) -> None:
        chosen = episode_array(episodes, len(dataset))
        super().__init__(dataset, spec.keys, chosen, dataset.lengths[chosen])
        self.spec = spec

    def _gather(self, episode: np.ndarray, step: np.ndarray) -> Batch:
        data, spec = self.dataset, self.spec
        length = data.lengths[episode][:, None]
        steps = step[:, None] + np.arange(spec.length)
        if spec.padding == "left_legacy":
            steps -= np.maximum(step[:, None] + spec.length - length, 0)
        mask = (steps >= step[:, None]) & (steps < length)
        steps = np.clip(steps, step[:, None], length - 1)
        rows = data.starts("action")[episode][:, None] + steps

        batch = self._observations(episode, steps)
        batch["action"] = gather_rows(data.column("action"), rows)
        if spec.reward_mode == "dense":
            reward = gather_rows(data.column("reward"), rows)
            rtg = gather_rows(data.returns_to_go, rows)
        else:
            rtg = np.repeat(data.episode_returns[episode][:, None], spec.length, axis=1)
            reward = np.where(steps == length - 1, rtg, 0.0)
        batch["reward"], batch["rtg"] = reward.astype(np.float32), rtg.astype(np.float32)
        batch["timestep"] = steps
        self._pad(batch, ~mask)
        batch["mask"] = mask
        batch["action_mask"] = mask.copy()
        batch["task"] = data.task_ids[episode]
        return batch

    def _pad(self, batch: Batch, padded: np.ndarray) -> None:
        """Overwrites what padded steps must not repeat of a real one."""
        legacy = self.spec.padding == "left_legacy"
        batch["action"][padded] = _LEGACY_ACTION if legacy else 0
        batch["reward"][padded] = 0
        if legacy:
            for key, value in batch.items():
                if key.startswith("obs/") or key in ("rtg", "timestep"):
                    value[padded] = np.zeros((), value.dtype)  # "" for text
