"""Training in several processes that torchrun has started.

    torchrun --nproc-per-node 2 scripts/train_mail.py ...

Data parallelism: every process holds the whole policy and takes an equal part of every batch, and
gradients are added up before each update. The batch size of a config is that of all processes
together, so a run's recipe does not depend on how many there are. Process 0 alone evaluates, prints
and writes.

The policy is wrapped in ``DistributedDataParallel``, which sums gradients in buckets while the
backward pass still runs. A sum of two numbers has one order only; with more than two processes, the
order in which a bucket is summed depends on where its weights lie in it, and that is decided anew
after the first update of a start: there a resumed run may differ in the last bits.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from mail_agents.artifact import checksum
from mail_agents.errors import InvalidInputError, MailAgentsError
from mail_agents.policy import resolve_device
from mail_agents.seeding import derive_seed
from mail_agents.training.runs import (
    RunArguments,
    ending_in_a_sentence,
    parse_arguments,
    started_processes,
)

if TYPE_CHECKING:
    from mail_agents.agent import Agent

#: Processes wait for the evaluation of the first one, which may take days.
_PATIENCE = timedelta(days=30)
#: Begins the names of what processes tell each other outside of torch's own exchanges.
_KEY = "mail-agents/"
#: For the start of all processes.
_MEETING = timedelta(minutes=10)

A = TypeVar("A", bound=RunArguments)


class LostProcessError(MailAgentsError):
    """Another process of this training has ended."""


class Team:
    """The processes of one training; a single one unless torchrun started more.

    Attributes:
        rank: Index of this process.
        size: Number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._local_rank = 0
        self._store: Any = None
        #: Where gradients are added up: the gloo group of all, or NCCL's for GPUs.
        self._group: Any = None

    def join(self) -> None:
        """Meets the other processes where torchrun started several; raises when they are gone."""
        if started_processes() == 1:
            return
        try:
            store, self.rank, self.size = next(rendezvous("env://", timeout=_MEETING))
        except (RuntimeError, ValueError, OSError) as error:
            raise LostProcessError(
                f"The {started_processes()} processes of this training did not meet at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}. Start all of them with "
                f"torchrun, or unset WORLD_SIZE. ({str(error).splitlines()[0]})"
            ) from error
        self._local_rank = int(os.environ.get("LOCAL_RANK") or self.rank)
        self._store = store
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE
        )

    @property
    def leads(self) -> bool:
        """Whether this is the process that evaluates, prints and writes."""
        return self.rank == 0

    def first_to_fail(self) -> bool:
        """Whether this process is the first to end with an error; it alone says why."""
        if self._store is None:
            return True
        try:
            return self._store.add(_KEY + "failed", 1) == 1
        except RuntimeError:  # the process that kept the store has gone, and has spoken
            return False

    def device(self, name: str) -> str:
        """The device of this process: one GPU each, or the CPU.

        Args:
            name: As asked for: ``"auto"``, ``"cpu"`` or ``"cuda"``.

        Raises:
            InvalidInputError: There are fewer GPUs than processes on this machine.
        """
        if self.size == 1 or resolve_device(name).type != "cuda":
            return name
        if self._local_rank >= torch.cuda.device_count():
            raise InvalidInputError(
                f"Process {self._local_rank} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}. Start as many processes as there are GPUs "
                "(torchrun --nproc-per-node), or train on the CPU with --device cpu."
            )
        torch.cuda.set_device(self._local_rank)
        return f"cuda:{self._local_rank}"

    def describe(self, agent: "Agent") -> str:
        """Names what an agent is trained on, for people."""
        return f"{self.size} x {agent.device.type}" if self.size > 1 else str(agent.device)

    def part(self, batch_size: int) -> int:
        """Samples of each batch that this process takes.

        Raises:
            InvalidInputError: The batch cannot be split evenly.
        """
        if batch_size % self.size:
            raise InvalidInputError(
                f"--config.optim.batch-size {batch_size} is the batch of all processes together "
                f"and cannot be split evenly over {self.size}; take a multiple of {self.size}."
            )
        return batch_size // self.size

    def check_same(self, what: str, value: str) -> None:
        """Refuses to train when processes were given different things.

        Args:
            what: For the message.
            value: Must be equal in all processes.

        Raises:
            InvalidInputError: It differs from what the first process has.
        """
        if self._store is None:
            return
        if self.leads:
            self._store.set(_KEY + what, value)
            return
        found = self._store.get(_KEY + what).decode()
        if found != value:
            raise InvalidInputError(
                f"Process {self.rank} has another {what} ({value[:40]}) than process 0 "
                f"({found[:40]}). Start all processes with the same arguments on the same files."
            )

    def begin(self, agent: "Agent") -> None:
        """Wraps the agent's policy so that gradients are summed over processes.

        Raises:
            InvalidInputError: Weights or statistics of the processes differ to begin with.
        """
        if self.size == 1:
            return
        self.check_same("set of weights", checksum(agent.policy.state_dict()))
        embeddings = agent.task_embeddings
        self.check_same(
            "set of statistics",
            checksum(
                [
                    agent.normalizers.state_dict(),
                    [] if embeddings is None else torch.from_numpy(embeddings),
                ]
            ),
        )
        on_gpu = agent.device.type == "cuda"
        self._group = dist.new_group(backend="nccl" if on_gpu else "gloo", timeout=_PATIENCE)
        # A static graph may have weights that no loss uses; their gradients stay None.
        with warnings.catch_warnings():
            # Later versions of torch name the flag differently, earlier ones know this name alone.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            agent.training_module = DistributedDataParallel(
                agent.policy, process_group=self._group, broadcast_buffers=False, static_graph=True
            )

    def reseed(self, agent: "Agent") -> None:
        """Gives this process random numbers of its own for the coming update.

        They depend on the seed, the update and the process alone, so that a run resumes exactly
        with as many processes. One process alone keeps its running streams.
        """
        if self.size > 1:
            path = (2, agent.updates, self.rank)
            agent.generator.manual_seed(derive_seed(agent.seed, "train", *path))
            torch.manual_seed(derive_seed(agent.seed, "train", *path, 1))

    def share(self, weight: float) -> float:
        """This process's part of a weight that all processes have parts of."""
        total = torch.tensor(weight, dtype=torch.float64)
        dist.all_reduce(total)
        return weight / float(total) if total > 0 else 0.0

    def backward(self, loss: Tensor, share: float) -> None:
        """Puts the gradients of the processes' losses, weighted by their shares, into the weights.

        Args:
            loss: This process's, a scalar.
            share: From :meth:`share`.
        """
        # DistributedDataParallel takes the mean over processes; shares ask for the sum.
        (loss * share * self.size if self.size > 1 else loss).backward()

    def mean(self, values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Means over processes of scalars, ``"loss"`` among them, weighted by their shares."""
        if self.size == 1:
            return dict(values)
        names, where = sorted(values), values["loss"].device
        parts = torch.stack([values[name].detach().to(where, torch.float32) for name in names])
        parts = torch.where(parts.isfinite() | (share > 0), parts * share, 0.0)
        dist.all_reduce(parts, group=self._group)
        return dict(zip(names, parts.unbind(), strict=True))

    def wait(self) -> None:
        """Waits until every process is here, however long the first one evaluates."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Ends the connection to the other processes."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def lost_processes() -> Iterator[None]:
    """Says what it means when the processes cannot reach each other any more.

    Raises:
        LostProcessError: In place of what the communication library raises.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LostProcessError(
            "Another process of this training cannot be reached: most likely it was killed, or ran "
            "out of memory. Continue from the last checkpoint with --resume. "
            f"({str(error).splitlines()[0]})"
        ) from error


def run_team_script(main: Callable[[A, Team], None], cls: type[A]) -> None:
    """Like :func:`~mail_agents.training.runs.run_script`, for scripts that torchrun may start.

    When a process fails, the others end, too, and only the first to fail says why.

    Args:
        main: The script, given its arguments and the processes of the training.
        cls: See :func:`~mail_agents.training.runs.parse_arguments`.

    Raises:
        SystemExit: See :func:`~mail_agents.training.runs.run_script`.
    """
    team = Team()
    try:
        with ending_in_a_sentence(team.first_to_fail) as known, lost_processes():
            team.join()
            # What the parser prints, help or a mistake in a flag, is the same in every process.
            with nullcontext() if team.leads else _silence():
                arguments = parse_arguments(cls)
            known.append(arguments.run_dir)
            main(arguments, team)
    finally:
        team.leave()


@contextmanager
def _silence() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
