"""Turns any interaction with an environment into episodes."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from mail_agents.data.env_specs import spec_to_dict
from mail_agents.data.episode import SUCCESS_KEYS, Episode
from mail_agents.data.sim_states import widen_states
from mail_agents.data.writer import StoreWriter
from mail_agents.errors import InvalidInputError
from mail_agents.features import FeatureSpec, as_mapping


class RecordEpisodes(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Records every episode that passes through, with its final observation and its seed.

    An episode is delivered when the environment ends it, when ``reset`` or ``close`` cuts it short
    (its last step is then marked truncated), and never without a step. Observations are copied, so
    environments may reuse their buffers. Actions are kept as given, before any clipping below.

    ``meta["success"]`` is true if ``info["success"]`` or ``info["is_success"]`` was true at any
    step, and absent if the environment never reports either.

    Arrays of ``info`` that the environment names in ``metadata["record_infos"]`` are kept too: with
    ``("state",)`` every ``info["state"]``, of reset and of all T steps, becomes the episode's
    ``infos["states"]`` ``(T+1, 128)``, filled up as in :mod:`mail_agents.data.sim_states`.

    >>> env = RecordEpisodes(gymnasium.make("CartPole-v1"))
    >>> observation, info = env.reset(seed=3)
    >>> for _ in range(5):
    ...     _ = env.step(1)
    >>> env.close()
    >>> len(env.episodes[0]), env.episodes[0].seed
    (5, 3)

    Args:
        env: A single environment (not a vector environment).
        sink: Where episodes go: a function, or a :class:`StoreWriter`; None keeps them in
            ``episodes``.
        task: Task name or instruction; the environment id when None.
        only_successful: Whether to deliver only episodes whose success was reported.

    Attributes:
        episodes: Episodes so far, when there is no sink.

    Raises:
        InvalidInputError: The action space is a Dict or Tuple, a vector environment is given, or
            (later) an ``info`` lacks an array that the environment names.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        sink: Callable[[Episode], Any] | StoreWriter | None = None,
        *,
        task: str | None = None,
        only_successful: bool = False,
    ) -> None:
        if isinstance(env, gymnasium.vector.VectorEnv):
            raise InvalidInputError(
                "RecordEpisodes wraps one environment. Wrap each one before vectorising: "
                "SyncVectorEnv([lambda: RecordEpisodes(make()), ...])."
            )
        # The sink is left out: an environment rebuilt from the spec keeps its episodes itself.
        gymnasium.utils.RecordConstructorArgs.__init__(
            self, task=task, only_successful=only_successful
        )
        gymnasium.Wrapper.__init__(self, env)
        if isinstance(env.action_space, spaces.Dict | spaces.Tuple):
            raise InvalidInputError(
                f"Actions of a {type(env.action_space).__name__} space cannot be recorded as one "
                "array. Flatten them first with gymnasium.wrappers.TransformAction."
            )
        self.episodes: list[Episode] = []
        self.task = task if task is not None or env.spec is None else env.spec.id
        self.only_successful = only_successful
        self._recorded: tuple[str, ...] = tuple(env.metadata.get("record_infos", ()))
        if sink is None:
            self._deliver: Callable[[Episode], Any] = self.episodes.append
        elif isinstance(sink, StoreWriter):
            self._deliver = sink.add
        else:
            self._deliver = sink
        self._begin(None, None)

    @property
    def features(self) -> FeatureSpec:
        """Schema of the recorded episodes with action bounds, for ``StoreWriter(features=...)``."""
        return FeatureSpec.from_spaces(self.env.observation_space, self.env.action_space)

    @property
    def env_specs(self) -> dict[str, Any]:
        """``{task: EnvSpec as JSON data}`` for ``StoreWriter(env_specs=...)``; {} when unknown."""
        if self.env.spec is None or self.task is None:
            return {}
        return {self.task: spec_to_dict(self.env.spec)}

    def _begin(self, seed: int | None, options: dict[str, Any] | None) -> None:
        self._seed, self._options = seed, options
        self._observations: list[dict[str, np.ndarray]] = []
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []
        self._ends: list[tuple[bool, bool]] = []
        self._infos: dict[str, list[np.ndarray]] = {name: [] for name in self._recorded}
        self._success: bool | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Delivers an episode that is still open, then resets the environment."""
        self._finish()
        observation, info = self.env.reset(seed=seed, options=options)
        self._begin(seed, options)
        self._observe(observation, info)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Steps the environment and records what happened."""
        taken = np.array(action, copy=True)
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._observe(observation, info)
        self._actions.append(taken)
        self._rewards.append(float(reward))
        self._ends.append((bool(terminated), bool(truncated)))
        for key in SUCCESS_KEYS:
            if key in info:
                self._success = bool(self._success) or bool(info[key])
        if terminated or truncated:
            self._finish()
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        """Delivers an episode that is still open, then closes the environment."""
        self._finish()
        self.env.close()

    def _observe(self, observation: Any, info: dict[str, Any]) -> None:
        self._observations.append({k: np.array(v) for k, v in as_mapping(observation).items()})
        for name, rows in self._infos.items():
            if name not in info:
                raise InvalidInputError(
                    f"{self.env} names {name!r} in metadata['record_infos'], but its info has only "
                    f"{', '.join(sorted(info)) or 'nothing'}. Report it in reset and every step."
                )
            rows.append(np.array(info[name]))

    def _finish(self) -> None:
        if self._actions:
            episode = self._episode()
            if self.only_successful and episode.success is None:
                raise InvalidInputError(
                    "only_successful needs info['success'] or info['is_success'], which "
                    f"{self.env} never reported. Record everything, or add a wrapper that does."
                )
            if not self.only_successful or episode.success:
                self._deliver(episode)
        self._begin(None, None)

    def _episode(self) -> Episode:
        ends = np.array(self._ends, bool)
        terminations, truncations = ends[:, 0].copy(), ends[:, 1].copy()
        if not terminations[-1]:
            truncations[-1] = True
        meta: dict[str, Any] = {} if self._success is None else {"success": self._success}
        if self._options:
            meta["options"] = self._options
        return Episode(
            observations={
                key: np.stack([observation[key] for observation in self._observations])
                for key in self._observations[0]
            },
            actions=np.stack(self._actions),
            rewards=np.array(self._rewards, np.float64),
            terminations=terminations,
            truncations=truncations,
            task=self.task,
            seed=self._seed,
            meta=meta,
            infos={f"{name}s": self._rows(name, rows) for name, rows in self._infos.items()},
        )

    def _rows(self, name: str, values: list[np.ndarray]) -> np.ndarray:
        rows = np.stack(values)
        if name != "state":
            return rows
        try:
            return widen_states(rows)
        except InvalidInputError as error:
            raise InvalidInputError(f"info['state'] of {self.env}: {error}") from error
