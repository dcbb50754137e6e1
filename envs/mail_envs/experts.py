"""Scripted experts, and the demonstrations they give."""

import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import lru_cache, partial
from typing import Any, Protocol

import gymnasium
import numpy as np

from mail_agents.data.env_specs import importable_id
from mail_agents.data.episode import Episode
from mail_agents.errors import InvalidInputError, MailAgentsError, require, unknown_name
from mail_agents.interrupts import ignoring_interrupts
from mail_agents.seeding import derive_env_seed
from mail_wrappers.record import RecordEpisodes

#: Attempts per wanted episode before :func:`collect_episodes` gives up.
ATTEMPTS_PER_EPISODE = 5

#: Distributions whose versions decide what an expert does; those not installed are left out.
_PROVENANCE: Mapping[str, tuple[str, ...]] = {
    "metaworld": ("gymnasium", "metaworld", "mujoco", "numpy"),
    "libero": ("gymnasium", "hf-libero", "libero", "mujoco", "numpy", "robosuite"),
    "robosuite": ("gymnasium", "mujoco", "numpy", "robosuite"),
}


class ExpertFailedError(MailAgentsError, RuntimeError):
    """A scripted expert did not reach the number of successes asked for."""


class ScriptedExpert(Protocol):
    """A hand-written controller of one environment; it may look inside the simulator.

    An expert may also have ``noise_scale``, an array of the action's shape: what one unit of noise
    means in each dimension, 1 when absent (a gripper that is a switch gains nothing from noise).

    Attributes:
        name: What to write into a dataset's provenance.
    """

    name: str

    def reset(self) -> None:
        """Forgets the previous episode; called after every ``env.reset``."""
        ...

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns an action inside the environment's action space."""
        ...


class MetaWorldExpert:
    """Meta-World's own scripted policy of a task (``metaworld.policies``), clipped to [-1, 1].

    Args:
        env: A ``metaworld/<task>`` environment; wrappers must keep the ``state`` observation.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        policies = require("metaworld.policies", "sim", purpose="the Meta-World experts")
        self._policy = policies.ENV_POLICY_MAP[env.get_wrapper_attr("task")]()
        self.name = f"metaworld.policies.{type(self._policy).__name__}"

    def reset(self) -> None:
        """Does nothing: upstream's policies have no memory."""

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the float32 ``(4,)`` action for one unbatched observation."""
        with warnings.catch_warnings():
            # "Constant(s) may be too high": upstream's gains rely on the clipping below.
            warnings.simplefilter("ignore", UserWarning)
            action = self._policy.get_action(observation["state"])
        return np.clip(action, -1.0, 1.0).astype(np.float32)


def _libero_expert(env: gymnasium.Env) -> ScriptedExpert:
    from mail_envs.libero_expert import LiberoExpert  # imports MuJoCo

    return LiberoExpert(env)


def _robosuite_expert(env: gymnasium.Env) -> ScriptedExpert:
    from mail_envs.robosuite_experts import robosuite_expert  # imports MuJoCo

    return robosuite_expert(env)


_EXPERTS: Mapping[str, Callable[[gymnasium.Env], ScriptedExpert]] = {
    "metaworld": MetaWorldExpert,
    "libero": _libero_expert,
    "robosuite": _robosuite_expert,
}


def world_of(env_id: str) -> str:
    """The family of a world: ``"libero"`` for ``mail_envs:libero_object/<task>``."""
    world = env_id.partition("/")[0].rpartition(":")[2]
    return "libero" if world.startswith("libero_") else world


def collection_kwargs(env_id: str) -> dict[str, Any]:
    """Keyword arguments of the environment that an expert acts in, where policies want others.

    LIBERO's demonstrations start from newly drawn placements, so that the stored initial states of
    the evaluation stay unseen.
    """
    return {"initial": "sampled"} if world_of(env_id) == "libero" else {}


def make_expert(env: gymnasium.Env) -> ScriptedExpert:
    """Returns the scripted expert of an environment made by ``gymnasium.make``.

    Raises:
        UnknownNameError: There is no expert for this world.
        InvalidInputError: There is one, but the task is beyond it.
    """
    name = env.spec.id if env.spec else type(env.unwrapped).__name__
    world = world_of(name)
    if world not in _EXPERTS:
        raise unknown_name("world with a scripted expert", world, _EXPERTS, f"Environment: {name}.")
    return _EXPERTS[world](env)


def run_attempt(
    env: gymnasium.Env,
    expert: ScriptedExpert,
    *,
    seed: int = 0,
    attempt: int = 0,
    noise_std: float = 0.0,
) -> Episode:
    """Lets the expert play one episode, successful or not.

    Attempt ``i`` depends on ``seed``, ``i`` and ``noise_std`` alone. With noise, a Gaussian
    perturbation is added to the expert's action, which is clipped and executed; the executed action
    is the one recorded, so the data are a trajectory that happened, of a noisy expert. An expert
    may scale the noise per dimension, see :class:`ScriptedExpert`.

    Args:
        env: Environment made by ``gymnasium.make``.
        expert: Its expert, see :func:`make_expert`.
        seed: Root seed of the collection.
        attempt: Index of the attempt, from 0.
        noise_std: Standard deviation of the noise in action units, at least 0.

    Returns:
        The episode; ``task`` is the last part of the environment id and ``meta`` has ``success``,
        ``source_id``, ``env_id``, ``expert``, ``noise_std``, ``attempt`` and ``versions``.

    Raises:
        InvalidInputError: The noise is negative or not finite.
    """
    if not 0.0 <= noise_std < np.inf:
        raise InvalidInputError(f"noise_std is {noise_std}; give a finite number of at least 0.")
    env_seed = derive_env_seed(seed, "data", attempt)
    # The second word separates this stream from the environment's, which starts at env_seed.
    noise = np.random.default_rng([env_seed, 1])
    scale = noise_std * getattr(expert, "noise_scale", 1.0)
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    env_id = importable_id(env.spec) if env.spec else type(env.unwrapped).__name__
    task = env_id.rpartition("/")[2]
    recorder = RecordEpisodes(env, task=task)
    observation, _ = recorder.reset(seed=env_seed)
    expert.reset()
    terminated = truncated = False
    while not (terminated or truncated):
        action = expert.act(observation)
        if noise_std > 0.0:
            action = np.clip(action + scale * noise.normal(0.0, 1.0, action.shape), low, high)
        action = action.astype(env.action_space.dtype)
        observation, _, terminated, truncated, _ = recorder.step(action)
    (episode,) = recorder.episodes
    provenance = {
        "source_id": f"{task}/{attempt:06d}",
        "env_id": env_id,
        "expert": expert.name,
        "noise_std": float(noise_std),
        "attempt": attempt,
        "versions": dict(_versions(world_of(env_id))),
    }
    return dataclasses.replace(episode, meta={**episode.meta, **provenance})


def collect_episodes(
    env_id: str,
    n_episodes: int,
    seed: int = 0,
    *,
    noise_std: float = 0.0,
    only_successful: bool = True,
    first_attempt: int = 0,
    env_kwargs: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    in_flight: int = 4,
) -> Iterator[Episode]:
    """Yields demonstrations of a scripted expert, in the order of their attempts.

    The result does not depend on the executor, and an interrupted collection continues with
    ``first_attempt`` one past the last attempt it had yielded.

    Args:
        env_id: Id for ``gymnasium.make`` of a world with an expert.
        n_episodes: How many episodes to yield, at least 1.
        seed: Root seed; attempt ``i`` uses ``derive_env_seed(seed, "data", i)``.
        noise_std: See :func:`run_attempt`.
        only_successful: Drop attempts that did not solve the task.
        first_attempt: Index of the first attempt.
        env_kwargs: Passed to ``gymnasium.make`` (cameras, image size, ...); JSON values only.
        executor: Runs attempts in parallel, see :func:`worker_pool`; None runs them here, one at a
            time.
        in_flight: With an executor, how many attempts may wait in it at once.

    Raises:
        ExpertFailedError: Too few successes in :data:`ATTEMPTS_PER_EPISODE` times ``n_episodes``
            attempts.
        InvalidInputError: A number is out of range.
    """
    if n_episodes < 1 or first_attempt < 0 or in_flight < 1:
        raise InvalidInputError(
            f"n_episodes={n_episodes} and in_flight={in_flight} must be at least 1, "
            f"first_attempt={first_attempt} at least 0."
        )
    inline = executor is None
    if executor is None:
        executor, in_flight = _InlineExecutor(), 1
    run = partial(_attempt, env_id, json.dumps(dict(env_kwargs or {})), seed, noise_std)
    budget = ATTEMPTS_PER_EPISODE * n_episodes
    pending: deque[Future[Episode]] = deque()
    submitted = tried = kept = 0
    try:
        while kept < n_episodes:
            room = min(n_episodes - kept, in_flight) - len(pending)
            for _ in range(min(room, budget - submitted)):
                pending.append(executor.submit(run, first_attempt + submitted))
                submitted += 1
            if not pending:
                raise ExpertFailedError(
                    f"The expert of {env_id} solved {kept} of {tried} attempts "
                    f"({kept / tried:.0%}) with noise_std={noise_std}; {n_episodes} successes were "
                    "wanted. Lower the noise (noise_std, --noise-std), or choose another task. In "
                    "Python, collect_episodes(..., only_successful=False) keeps failures, too."
                )
            episode = pending.popleft().result()
            tried += 1
            if episode.success or not only_successful:
                kept += 1
                yield episode
    finally:
        for future in pending:
            future.cancel()
        if inline:
            _env_and_expert.cache_clear()


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[Executor | None]:
    """Processes for :func:`collect_episodes`; they end with this process, even if it is killed.

    Args:
        workers: Number of processes; 1 yields None, which means this process.

    Raises:
        InvalidInputError: ``workers`` is less than 1.
    """
    if workers < 1:
        raise InvalidInputError(f"workers is {workers}; give at least 1.")
    if workers == 1:
        yield None
        return
    # Spawned, because an OpenGL context does not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_watch_parent)
    with ignoring_interrupts():
        for _ in range(workers):
            pool.submit(os.getpid)  # while none is idle, every task starts a process
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _watch_parent() -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _InlineExecutor(Executor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _attempt(env_id: str, kwargs: str, seed: int, noise_std: float, attempt: int) -> Episode:
    env, expert = _env_and_expert(env_id, kwargs)
    return run_attempt(env, expert, seed=seed, attempt=attempt, noise_std=noise_std)


# Loading a scene costs as much as several episodes, so a process keeps the one it is working on.
# Which environment plays an attempt cannot be seen in the result: a reset leaves nothing behind.
@lru_cache(maxsize=1)
def _env_and_expert(env_id: str, kwargs: str) -> tuple[gymnasium.Env, ScriptedExpert]:
    _env_and_expert.cache_clear()  # a scene of LIBERO takes over a gigabyte: never hold two
    env = gymnasium.make(env_id, **json.loads(kwargs))
    return env, make_expert(env)


@lru_cache
def _versions(world: str) -> tuple[tuple[str, str], ...]:
    found = []
    for name in _PROVENANCE.get(world, ("gymnasium", "numpy")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append((name, importlib.metadata.version(name)))
    return tuple(found)
