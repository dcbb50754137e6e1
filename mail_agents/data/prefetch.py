"""Reading ahead: the next batches are gathered while the network trains on the current one."""

import queue
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mail_agents.data.views import Batch, StepView

if TYPE_CHECKING:
    from mail_agents.data.windows import BatchSampler

#: Seconds after which a blocked thread looks whether it is to end.
_POLL = 0.1


def _unchanged(batch: Batch) -> Mapping[str, Any]:
    return batch


class Prefetcher:
    """Batches of a sampler, in its order, gathered by a thread that stays a little ahead.

    Copying rows out of arrays releases the interpreter, so that gathering costs a train loop
    nothing while a core is free. What is given, and :meth:`state_dict`, is as if every batch were
    gathered when it is asked for. Samples that only top up a batch have no targets
    (``action_mask``), see :class:`~mail_agents.data.windows.BatchSampler`. Use it as a context
    manager::

        with Prefetcher(windows, sampler) as batches:
            batch = next(batches)

    Args:
        view: Where samples come from; only the thread reads it.
        sampler: Which ones; the thread alone may advance it until :meth:`close`.
        ahead: Batches to hold ready; 0 gathers each when it is asked for, without a thread.
        finish: Applied to each batch by the thread, for example to copy it to pinned memory.
    """

    def __init__(
        self,
        view: StepView,
        sampler: "BatchSampler",
        ahead: int = 2,
        finish: Callable[[Batch], Mapping[str, Any]] = _unchanged,
    ) -> None:
        self._view, self._sampler, self._finish = view, sampler, finish
        self._state = sampler.state_dict()
        self._ready: queue.Queue[tuple[Any, dict[str, int], BaseException | None]] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if ahead > 0:
            self._ready = queue.Queue(ahead)
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()

    def _gather(self) -> Mapping[str, Any]:
        batch = self._view[next(self._sampler)]
        if self._sampler.repeated:
            batch["action_mask"][-self._sampler.repeated :] = False
        return self._finish(batch)

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                item = (self._gather(), self._sampler.state_dict(), None)
            except BaseException as error:  # raised again where the batch is asked for
                item = (None, {}, error)
            self._put(item)
            if item[2] is not None:
                return

    def _put(self, item: tuple[Any, dict[str, int], BaseException | None]) -> None:
        assert self._ready is not None
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=_POLL)
            except queue.Full:
                continue

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Mapping[str, Any]:
        """The next batch; an error that reading it ran into is raised here.

        Raises:
            RuntimeError: The prefetcher is closed.
        """
        if self._closed.is_set():
            raise RuntimeError("The prefetcher is closed.")
        if self._ready is None:
            batch = self._gather()
            self._state = self._sampler.state_dict()
            return batch
        batch, state, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        self._state = state
        return batch

    def state_dict(self) -> dict[str, int]:
        """State of the sampler after the last batch that was given; later ones do not count."""
        return dict(self._state)

    def close(self) -> None:
        """Ends the thread and puts the sampler where the last given batch left it."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._sampler.load_state_dict(self._state)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
