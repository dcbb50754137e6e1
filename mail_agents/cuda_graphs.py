"""CUDA graphs: acting recorded once per shape of its inputs and replayed as a whole.

A network that acts launches thousands of small kernels, and launching them takes longer than
running them. A graph launches all of them at once. It replays them on the addresses they were
recorded with: inputs are copied into buffers of the graph, weights are read where they are. Updates
of the weights in place are seen, therefore; weights in another place need another recording.
"""

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError
from mail_agents.ops.backends import requested_backend

#: Recordings kept; the one that was not used for longest gives way. After as many have given way,
#: kinds of input that are new are not recorded any more: recording takes longer than running.
MAX_GRAPHS = 16
# Kernels are loaded and tuned in the first runs, which a recording must not contain.
_WARM_UP = 3
_log = logging.getLogger(__name__)

#: Of a function without arguments, which has run before: what runs it again, and the tensor that
#: holds the result after each run.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class CudaRecorder:
    """Records CUDA graphs, which share their memory: no two of them run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See :data:`Record`."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, such as the one that reads batches ahead.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()
        return graph.replay, output


class _Graph(NamedTuple):
    """A recording, the buffers it reads and writes, and where it relies on finding the rest."""

    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    output: Tensor
    places: tuple[Any, ...]


class Graphs:
    """The recordings of one module. A copy of it has none, as it belongs to another module.

    Threads wait for one another here, as they would share the buffers of a recording.

    Args:
        record: Makes a recording; None for CUDA graphs, with which tensors of other devices run as
            they would without.
    """

    def __init__(self, record: Record | None = None) -> None:
        self._given = record
        self._record = record or CudaRecorder()
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._gone = 0
        self._lock = threading.RLock()  # a function may ask for a recording of a part of it

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self._given,)

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self,
        function: Callable[..., Tensor],
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        *state: Any,
    ) -> Tensor:
        """Returns ``function(module, inputs, *state)``, by replaying a recording of it.

        What cannot be recorded runs directly: anything with gradients, a part of a larger
        recording, and tensors that are not on a GPU.

        Args:
            function: Deterministic, without influence of values on what runs. Known again by its
                identity: no lambda, no closure.
            module: Its parameters and buffers are read.
            inputs: Read only.
            state: Nests (tuples) of tensors that are updated in place.

        Raises:
            InvalidInputError: The function does something that a graph cannot hold; ``state`` is
                then as it was.
        """
        device = next(iter(inputs.values())).device
        if not self._recordable(device):
            return function(module, inputs, *state)
        # Sorted by name, so that the order of a dictionary makes no new recording.
        kinds = sorted((k, v.shape, v.dtype, v.device) for k, v in inputs.items())
        key = (function, requested_backend(), _casting(device.type), *kinds)
        with self._lock, _current(device):
            graph = self._find(key, function, module, inputs, state)
            if graph is not None:
                for name, value in inputs.items():
                    graph.inputs[name].copy_(value)
                graph.replay()
                return graph.output.clone()
        return function(module, inputs, *state)

    def _find(
        self,
        key: Any,
        function: Callable[..., Tensor],
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        state: tuple[Any, ...],
    ) -> _Graph | None:
        """Finds or makes the recording; None where there are too many kinds of input."""
        places = (*_addresses(module), *_places(state))
        graph = self._graphs.get(key)
        if graph is None and self._gone >= MAX_GRAPHS:
            return None
        if graph is None or graph.places != places:
            graph = self._graphs[key] = self._new(function, module, inputs, state, places)
        self._graphs.move_to_end(key)
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
            self._gone += 1
            if self._gone == MAX_GRAPHS:
                _log.warning(
                    "Acting met more than %d kinds of input (numbers of rows, lengths of history). "
                    "The last %d stay recorded, others run without a recording from now on. Act "
                    "with equally many rows at every call to use recordings.",
                    *(2 * MAX_GRAPHS - 1, MAX_GRAPHS),
                )
        return graph

    def _recordable(self, device: torch.device) -> bool:
        if torch.is_grad_enabled():
            return False
        if self._given is not None:
            return True
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def _new(
        self,
        function: Callable[..., Tensor],
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        state: tuple[Any, ...],
        places: tuple[Any, ...],
    ) -> _Graph:
        # Buffers of inference mode could not be filled outside of it.
        with torch.inference_mode(False):
            buffers = {name: torch.empty_like(value) for name, value in inputs.items()}
        for name, value in inputs.items():
            buffers[name].copy_(value)

        device = next(iter(buffers.values())).device
        casting = _casting(device.type)

        # Autocast may not hand out weights that it has cast outside of the recording.
        @torch.autocast(device.type, casting, casting is not None, cache_enabled=False)
        def run() -> Tensor:
            return function(module, buffers, *state)

        with _restored(state):
            _warm_up(run, device)
            try:
                replay, output = self._record(run)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise InvalidInputError(
                    "Acting could not be recorded as a CUDA graph: "
                    f"{str(error).splitlines()[0]} Something in it waits for the GPU or copies "
                    "from the CPU. Leave out --compile or policy.compile() to act without."
                ) from error
        return _Graph(buffers, replay, output, places)


def _casting(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Streams are those of the current device, and only what is on them is recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _warm_up(run: Callable[[], Tensor], device: torch.device) -> None:
    """Runs what is to be recorded, so that its own errors are raised as they are."""
    if device.type != "cuda":
        run()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)


@contextlib.contextmanager
def _restored(state: tuple[Any, ...]) -> Iterator[None]:
    """Undoes what happens to the tensors of a nest inside, also where it fails."""
    before = [leaf.clone() for leaf in _leaves(state)]
    try:
        yield
    finally:
        for leaf, value in zip(_leaves(state), before, strict=True):
            leaf.copy_(value)


def _addresses(module: nn.Module) -> list[int]:
    """Where all parameters and buffers are. Written out, as this is asked at every call."""
    found, waiting = [], [module]
    while waiting:
        each = waiting.pop()
        found += [p.data_ptr() for p in each._parameters.values() if p is not None]
        found += [b.data_ptr() for b in each._buffers.values() if b is not None]
        waiting += [child for child in each._modules.values() if child is not None]
    return found


def _places(tree: Any) -> Iterator[Any]:
    """What a recording relies on in a nest: where tensors are and how they lie there."""
    if isinstance(tree, Tensor):
        yield tree.data_ptr(), tree.shape, tree.stride(), tree.dtype
    elif isinstance(tree, tuple):
        yield len(tree)
        for each in tree:
            yield from _places(each)
    else:
        yield tree  # a number that the function may have read


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for each in tree:
            yield from _leaves(each)
