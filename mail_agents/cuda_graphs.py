"""CUDA graphs: acting recorded once per shape of its inputs and replayed as a whole.

A network that acts launches thousands of small kernels, and launching them takes longer than
running them. A graph launches all of them at once. It replays them on the addresses they were
recorded with: inputs are copied into buffers of the graph, weights are read where they are. Updates
of the weights in place are seen, therefore; weights in another place need another recording.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mail_agents.errors import InvalidInputError
from mail_agents.ops.backends import requested_backend

#: Recordings kept; the one that was not used for longest gives way.
MAX_GRAPHS = 16
# Kernels are loaded and tuned in the first runs, which a recording must not contain.
_WARM_UP = 3

#: Of a function without arguments, which it may call several times: what runs it again, and the
#: tensor that holds the result after each run.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class CudaRecorder:
    """Records CUDA graphs, which share their memory: no two of them run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See :data:`Record`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, such as the one that reads batches ahead.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()
        return graph.replay, output


class _Graph(NamedTuple):
    """A recording, the buffers it reads and writes, and the addresses it relies on."""

    inputs: dict[str, Tensor]
    replay: Callable[[], None]
    output: Tensor
    addresses: tuple[int, ...]


class Graphs:
    """The recordings of one module. A copy of it has none, as it belongs to another module.

    Args:
        record: Makes a recording; None for CUDA graphs, with which tensors of other devices run as
            they would without.
    """

    def __init__(self, record: Record | None = None) -> None:
        self._given = record
        self._record = record or CudaRecorder()
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphs":
        return Graphs(self._given)

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
            state: Nests of tensors that are updated in place.

        Raises:
            InvalidInputError: The function does something that a graph cannot hold.
        """
        device = next(iter(inputs.values())).device.type
        if not self._recordable(device):
            return function(module, inputs, *state)
        casting = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Sorted by name, so that the order of a dictionary makes no new recording.
        kinds = sorted((k, v.shape, v.dtype, v.device) for k, v in inputs.items())
        key = (function, requested_backend(), casting, *kinds)
        addresses = (*_addresses(module), *(leaf.data_ptr() for leaf in _leaves(state)))
        graph = self._graphs.get(key)
        if graph is None or graph.addresses != addresses:
            # Autocast may not hand out weights that it has cast outside of the recording.
            cast = torch.autocast(device, casting, casting is not None, cache_enabled=False)
            graph = self._new(cast(function), module, inputs, state, addresses)
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        for name, value in inputs.items():
            graph.inputs[name].copy_(value)
        graph.replay()
        return graph.output.clone()

    def _recordable(self, device: str) -> bool:
        if torch.is_grad_enabled():
            return False
        if self._given is not None:
            return True
        return device == "cuda" and not torch.cuda.is_current_stream_capturing()

    def _new(
        self,
        function: Callable[..., Tensor],
        module: nn.Module,
        inputs: Mapping[str, Tensor],
        state: tuple[Any, ...],
        addresses: tuple[int, ...],
    ) -> _Graph:
        # Buffers of inference mode could not be filled outside of it.
        with torch.inference_mode(False):
            buffers = {name: torch.empty_like(value) for name, value in inputs.items()}
        for name, value in inputs.items():
            buffers[name].copy_(value)
        before = [leaf.clone() for leaf in _leaves(state)]
        try:
            replay, output = self._record(lambda: function(module, buffers, *state))
        except RuntimeError as error:
            raise InvalidInputError(
                "Acting could not be recorded as a CUDA graph: "
                f"{str(error).splitlines()[0]} Something in it waits for the GPU or copies from "
                "the CPU. Leave out --compile or policy.compile() to act without."
            ) from error
        for leaf, value in zip(_leaves(state), before, strict=True):
            leaf.copy_(value)
        return _Graph(buffers, replay, output, addresses)


def _addresses(module: nn.Module) -> list[int]:
    """Where all parameters and buffers are. Written out, as this is asked at every call."""
    found, waiting = [], [module]
    while waiting:
        each = waiting.pop()
        found += [p.data_ptr() for p in each._parameters.values() if p is not None]
        found += [b.data_ptr() for b in each._buffers.values() if b is not None]
        waiting += [child for child in each._modules.values() if child is not None]
    return found


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for each in tree:
            yield from _leaves(each)
