"""Evaluating on every task a dataset was recorded from, with videos."""

import contextlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

from mail_agents.env_workers import WorkerPool
from mail_agents.environments import MakeEnv, env_maker
from mail_agents.errors import InvalidInputError, MailAgentsError
from mail_agents.features import FeatureSpec
from mail_agents.report.results import TaskResult, Video, group_by_task
from mail_agents.rollout import Evaluation, check_target_returns, evaluate

if TYPE_CHECKING:
    import numpy as np

    from mail_agents.agent import Agent


#: Folders of further target returns, inside a task's folder.
_TARGET = "target-"
#: Beginnings of the names of videos.
_OUTCOMES = {True: "success", False: "failure", None: "episode"}


@dataclass(frozen=True)
class World:
    """How to make the environment of one task.

    Attributes:
        task: Task name, as in the dataset.
        env_id: Gymnasium id; ``"module:id"`` imports a module first.
        kwargs: Passed to ``gymnasium.make``.
        max_steps: Step limit, or None for the environment's own.
    """

    task: str
    env_id: str
    kwargs: Mapping[str, Any]
    max_steps: int | None = None

    @classmethod
    def from_spec(cls, task: str, spec: Mapping[str, Any]) -> "World":
        """Takes id, keyword arguments and limit of a stored Gymnasium spec.

        The spec's entry point is deliberately not used: a data file must not choose what code runs.
        """
        if "id" not in spec:
            raise InvalidInputError(
                f"The dataset's environment of task {task!r} has no id: {dict(spec)}."
            )
        return cls(
            task, str(spec["id"]), dict(spec.get("kwargs") or {}), spec.get("max_episode_steps")
        )

    def check(self) -> None:
        """Looks the environment up without making it, so that a run fails before it trains.

        Raises:
            InvalidInputError: Nothing registers the id here.
        """
        module, _, name = self.env_id.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            gymnasium.spec(name)
        except (ImportError, gymnasium.error.Error) as error:
            raise InvalidInputError(
                f"The environment {self.env_id!r} of task {self.task!r} cannot be found here: "
                f"{error} Install the package that registers it, and name its module in the id "
                "('module:id') with scripts/evaluate.py --env, or train with --eval-episodes 0."
            ) from error

    def check_agent(self, agent: "Agent") -> None:
        """Makes the environment once, so that what an agent cannot act in is known before training.

        Args:
            agent: Its features are compared with the environment's, and the length of an episode
                with what it can act for.

        Raises:
            InvalidInputError: The environment cannot be made, or its episodes are too long.
            FeatureMismatchError: It does not give what the agent sees.
        """
        try:
            env = self.maker()()
        except Exception as error:  # simulators raise anything
            kind = "" if isinstance(error, MailAgentsError) else f"{type(error).__name__}: "
            raise InvalidInputError(
                f"The environment {self.env_id!r} of task {self.task!r} cannot be made here: "
                f"{kind}{error}\nTo train without evaluating, give --eval-episodes 0."
            ) from error
        try:
            features = FeatureSpec.from_spaces(env.observation_space, env.action_space)
            agent.features.check(features, that=f"environment of task {self.task!r}")
            steps = None if env.spec is None else env.spec.max_episode_steps
        finally:
            env.close()
        if steps is None:
            return
        try:
            agent.check_episode_length(steps)
        except InvalidInputError as error:
            raise InvalidInputError(
                f"Episodes of task {self.task!r} may have {steps} steps. {error}"
            ) from error

    def maker(self, **extra: Any) -> MakeEnv:
        """Returns a function that makes the environment, with further keyword arguments."""
        return env_maker(self.env_id, {**self.kwargs, **extra}, self.max_steps)


def worlds_of(env_specs: Mapping[str, Mapping[str, Any]]) -> list[World]:
    """The environments of a dataset (``dataset.info.env_specs``), in task order.

    Raises:
        InvalidInputError: The dataset does not say which environments it came from, or one of them
            is not registered here.
    """
    if not env_specs:
        raise InvalidInputError(
            "The dataset does not name its environments, so there is nothing to evaluate in. "
            "Name one: --env ID (scripts/evaluate.py), or train with --eval-episodes 0."
        )
    worlds = [World.from_spec(task, spec) for task, spec in env_specs.items()]
    for world in worlds:
        world.check()
    return worlds


def evaluate_worlds(
    agent: "Agent",
    worlds: Sequence[World],
    n_episodes: int,
    *,
    seed: int,
    n_envs: int | None = None,
    workers: int = 1,
    deterministic: bool = False,
    target_returns: Sequence[float] = (),
    directory: Path | None = None,
    videos: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Evaluation]:
    """Evaluates every task, says one line each, and optionally writes results and videos.

    Return-conditioned agents are evaluated once per task and target return. The first target gives
    the headline: what is returned, and written where agents without targets have it.

    Args:
        agent: A trained agent.
        worlds: The tasks' environments, see :func:`worlds_of`.
        n_episodes: Episodes per task.
        seed: Root seed of the episodes.
        n_envs: Environments side by side; None takes what each environment suggests, else 20.
        workers: Processes that host the environments; 1 hosts them here.
        deterministic: Whether the agent leaves out sampling noise.
        target_returns: Returns to aim for; none named means the agent's own. Results of all but the
            first go into ``target-<value>`` inside the task's folder.
        directory: Where ``episodes.jsonl``, ``summary.json`` and videos go, one folder per task;
            those of an earlier evaluation are deleted first.
        videos: Successful episodes to record per task, and as many failed ones.
        say: Receives one line per task.

    Returns:
        Evaluations by task, for the first target.

    Raises:
        InvalidInputError: See :func:`check_targets`.
    """
    check_targets(agent, target_returns)
    if directory is not None:
        for world in worlds:
            _clear(task_directory(directory, world.task))
    evaluations = {}
    with contextlib.ExitStack() as stack:
        # Kept from task to task: importing a simulator takes longer than some episodes.
        hosts = stack.enter_context(WorkerPool(workers)) if workers > 1 else workers
        for world in worlds:
            play = partial(
                evaluate,
                agent,
                world.env_id,
                seed=seed,
                task=world.task,
                deterministic=deterministic,
                max_steps=world.max_steps,
                workers=hosts,
            )
            folder = None if directory is None else task_directory(directory, world.task)
            for number, target in enumerate(target_returns or (None,)):
                found = play(
                    n_episodes,
                    n_envs=n_envs,
                    env_kwargs=world.kwargs,
                    target_return=target,
                )
                aimed = found.protocol["target_return"]
                say(f"{world.task}{'' if aimed is None else f', target {aimed:g}'}: {found}")
                if folder is not None:
                    found.save(folder if number == 0 else folder / f"{_TARGET}{target:g}")
                evaluations.setdefault(world.task, found)
            if folder is not None:
                camera = {**world.kwargs, "render_mode": "rgb_array"}
                target = target_returns[0] if target_returns else None
                filmed = partial(play, env_kwargs=camera, target_return=target)
                _record(evaluations[world.task], filmed, videos, folder)
    return evaluations


def check_targets(agent: "Agent", target_returns: Sequence[float]) -> None:
    """Refuses target returns that would change nothing or overwrite each other's results.

    Raises:
        InvalidInputError: The agent does not use target returns, or a target is not a finite
            number of its own.
    """
    if target_returns:
        check_target_returns(agent, target_returns)
    if len({f"{target:g}" for target in target_returns}) < len(target_returns):
        raise InvalidInputError(
            f"Target returns must differ in their first six digits; got {list(target_returns)}."
        )


def _clear(folder: Path) -> None:
    """Deletes what an earlier evaluation wrote for a task, which must not mix with a new one."""
    for name in ("episodes.jsonl", "summary.json"):
        (folder / name).unlink(missing_ok=True)
    for outcome in _OUTCOMES.values():
        for video in folder.glob(f"{outcome}-[0-9]*.mp4"):
            video.unlink()
    for target in folder.glob(f"{_TARGET}*"):
        shutil.rmtree(target)


def _record(
    evaluation: Evaluation, film: Callable[..., Evaluation], count: int, directory: Path
) -> None:
    """Plays the first solved and failed episodes again with a camera, and names the outcome."""
    solved = [e.index for e in evaluation.episodes if e.success][:count]
    failed = [e.index for e in evaluation.episodes if not e.success][:count]
    for index in solved + failed:
        again = film([index], record=[index])
        outcome = _OUTCOMES[again.episodes[0].success]
        path = directory / f"{outcome}-{index:03d}.mp4"
        write_video(path, again.frames[index], again.fps)


def evaluation_directory(run: str | Path, step: int) -> Path:
    """Where a run keeps the evaluation after ``step`` updates, one folder per task."""
    return Path(run) / "eval" / f"step-{step:08d}"


def task_directory(directory: str | Path, task: str) -> Path:
    """Where an evaluation keeps the results of one task."""
    return Path(directory) / task.replace("/", "-")


def completed_evaluations(run: str | Path, tasks: Sequence[str]) -> dict[int, list[TaskResult]]:
    """Reads every complete evaluation of a run, by step; those of a killed run are left out."""
    found = {}
    for directory in sorted((Path(run) / "eval").glob("step-*")):
        results = _task_results(task_directory(directory, task) for task in tasks)
        if results is not None:
            found[int(directory.name.removeprefix("step-"))] = results
    return found


def played_world(protocol: Mapping[str, Any]) -> str:
    """Names the environment of an evaluation by its protocol, with the simulator where it is known.

    Returns:
        For example ``"d4rl/hopper (Gymnasium's Hopper-v4, MuJoCo 3.3.0 instead of 2)"``.
    """
    simulator = protocol.get("simulator")
    return f"{protocol['env']} ({simulator})" if simulator else str(protocol["env"])


def played_worlds(directory: str | Path, tasks: Sequence[str]) -> dict[str, str]:
    """Reads :func:`played_world` of every task of an evaluation that says it.

    Args:
        directory: Of one evaluation, for example :func:`evaluation_directory`.
        tasks: Names of the tasks.
    """
    files = {task: task_directory(directory, task) / "summary.json" for task in tasks}
    return {
        task: played_world(json.loads(file.read_text("utf-8"))["protocol"])
        for task, file in files.items()
        if file.exists()
    }


def completed_targets(directory: str | Path, tasks: Sequence[str]) -> dict[str, list[TaskResult]]:
    """Reads the results of target returns after the first, by target (``"3600"``).

    Targets without results for every task, those of a killed run, are left out.

    Args:
        directory: Of one evaluation, for example :func:`evaluation_directory`.
        tasks: Names of the tasks.
    """
    folders = [task_directory(directory, task) for task in tasks]
    names = sorted({path.name for folder in folders for path in folder.glob(f"{_TARGET}*")})
    found = {}
    for name in names:
        results = _task_results(folder / name for folder in folders)
        if results is not None:
            found[name.removeprefix(_TARGET)] = results
    return found


def _task_results(folders: Iterable[Path]) -> list[TaskResult] | None:
    files = [folder / "episodes.jsonl" for folder in folders]
    if not all(file.exists() for file in files):
        return None
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return group_by_task(json.loads(line) for line in lines)


def recorded_videos(directory: str | Path) -> list[Video]:
    """Lists the videos that :func:`evaluate_worlds` wrote, one folder per task."""
    outcomes = {name: success for success, name in _OUTCOMES.items()}
    videos = []
    for path in sorted(Path(directory).glob("*/*.mp4")):
        outcome, _, index = path.stem.partition("-")
        caption = f"episode {int(index)}"
        videos.append(Video(str(path), path.parent.name, outcomes[outcome], caption))
    return videos


def write_video(path: str | Path, frames: "list[np.ndarray]", fps: float) -> Path:
    """Writes RGB frames ``(height, width, 3)`` uint8 as an mp4 (H.264)."""
    import imageio.v2 as imageio  # imported here: it starts a subprocess module few runs need

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(path, fps=fps, macro_block_size=2, codec="libx264") as writer:
        for frame in frames:
            writer.append_data(frame)  # type: ignore[attr-defined]
    return path
