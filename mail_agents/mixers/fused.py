"""Inference of Mamba layers without calling their modules, where nobody can tell the difference.

Modules are a way to describe the computation here, not to run it: hooks on inner modules, replaced
modules, exotic tensors, gradients or tracing all lead back to the modules themselves.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mail_agents.ops._layer_native import LayerStack, LayerWeights, State
from mail_agents.ops._native import load, recorded
from mail_agents.ops.backends import Candidate, note_backend, refuse_torch_func, requested_backend

#: Norm in front (absent in a mixer on its own) and mixer of every layer, and the norm after them.
Layers = tuple[list[tuple[nn.Module | None, nn.Module]], nn.Module | None]

#: For the report: what can run, without gradients; elsewhere layers are modules.
_CANDIDATES = (Candidate("native", LayerStack.run, lambda *_: load().failure or None),)
_PLAIN = (Tensor, nn.Parameter)
#: What the kernel computes in place of the modules.
_METHODS = ("forward", "prefill", "step", "_run", "_select", "_decay", "_blocks")
#: Some packages put other methods in their place.
_FORWARDS = (nn.Linear.forward, nn.LayerNorm.forward)


class FusedLayers:
    """Runs the layers of a module in one go; one instance per module.

    One call of the native kernel, where that is to be had.

    What it keeps between calls is compared with the module at every call. It is not part of the
    module's state: copies of the module start without it.

    Args:
        layers: Returns what the module consists of, or None when that is nothing for the kernel.
    """

    def __init__(self, layers: Callable[[Any], Layers | None]) -> None:
        self._layers = layers
        self._plan: _Plan | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedLayers":
        return FusedLayers(self._layers)

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedLayers, (self._layers,)

    def run(
        self,
        owner: nn.Module,
        x: Tensor,
        dims: int,
        state: Sequence[State] | None = None,
        aggregate: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, list[State]] | None:
        """Runs all layers, or returns None where the modules have to be called.

        Args:
            owner: The module.
            x: Tokens, (B, L, D) or (B, D).
            dims: How many dimensions ``x`` has to have.
            state: History and recurrent state of every layer; None is zero.
            aggregate: Added to the residual stream after every layer, like ``x``.
            return_state: Whether to return new states (else the list is empty).

        Raises:
            UnknownNameError: There is no backend of the name that was asked for.
        """
        if torch.is_grad_enabled() or not _plain(x):
            return None
        if not x.numel() or (aggregate is not None and not _plain(aggregate)) or _watched():
            return None
        plan = self._plan
        if plan is None or not plan.valid(owner):
            plan = self._plan = _make_plan(owner, self._layers)
        if plan is None:
            return None
        stack, backend = plan.stack, plan.backend()
        if backend is None or x.dim() != dims or x.shape[-1] != stack.d_model:
            return None
        if requested_backend(backend) not in ("auto", "native") or load().failure:
            return None
        if not stack.takes(state, x.shape[0]) if state is not None else dims == 2:
            return None
        note_backend("mamba_layers", "native", ())
        return stack.run(x, state, aggregate, return_state)

    def stack_of(self, owner: nn.Module) -> tuple[LayerStack, str] | None:
        """Returns the layers and their ``backend``, or None where the modules have to be called."""
        plan = _make_plan(owner, self._layers)
        backend = None if plan is None else plan.backend()
        return None if plan is None or backend is None else (plan.stack, backend)


def _plain(x: Tensor) -> bool:
    return type(x) in _PLAIN and x.dtype is torch.float32 and x.is_cpu and not x.is_neg()


def _watched() -> bool:
    """Whether something looks at single operations, or gives them another meaning."""
    return bool(
        recorded()
        or torch.is_autocast_enabled("cpu")
        or refuse_torch_func()
        or nn.modules.module._has_any_global_hook()
    )


class _Plan:
    """Addresses of a module's parameters, and all that tells whether they still hold."""

    def __init__(
        self, inner: Sequence[nn.Module], owner: nn.Module, mixers: Any, stack: LayerStack
    ) -> None:
        self.stack = stack
        modules = [owner, *inner]
        self._owner = owner.__dict__  # shallow copies share everything else
        self._mixers = [mixer.__dict__ for mixer in mixers]
        self._norms = [m.__dict__ for m in inner if type(m) is nn.LayerNorm]
        self._inner = [module.__dict__ for module in inner]
        self._attributes = list(map(len, self._inner))
        self._hooks, self._handles = _hooks(inner), RemovableHandle.next_id
        self._child_dicts = [m._modules for m in modules if m._modules]
        self._children = _values(self._child_dicts)
        self._parameter_dicts = [m._parameters for m in modules if m._parameters]
        self._slots = _values(self._parameter_dicts)
        self._parameters = [p for p in self._slots if p is not None]
        # Only these can be transposed in place of themselves.
        self._square = [p for p in self._parameters if p.dim() > 1 and p.shape[0] == p.shape[1]]
        self._types = list(map(type, inner))
        self._modules = inner
        self._places = self._where()

    def valid(self, owner: nn.Module) -> bool:
        """Whether all is as it was: children, parameters and where they are, and no hooks."""
        if owner.__dict__ is not self._owner or not self._unwatched():
            return False
        if (nn.Linear.forward, nn.LayerNorm.forward) != _FORWARDS:
            return False
        if any(norm["eps"] != self.stack.eps for norm in self._norms):
            return False
        slots = _values(self._parameter_dicts)
        return (
            _values(self._child_dicts) == self._children
            and list(map(type, self._modules)) == self._types
            and len(slots) == len(self._slots)
            and all(map(is_, slots, self._slots))
            and self._where() == self._places
        )

    def _unwatched(self) -> bool:
        """Whether calling the modules would run nothing but their classes' ``forward``.

        Looking into all of them takes most of the time where they are not in the cache, so it is
        done only after a hook was registered somewhere or one of them got another attribute.
        """
        handles, attributes = RemovableHandle.next_id, list(map(len, self._inner))
        if handles == self._handles and attributes == self._attributes:
            return True
        self._handles, self._attributes = handles, attributes
        return not any(self._hooks) and not _replaced(self._inner)

    def backend(self) -> str | None:
        """Returns the ``backend`` of the mixers, or None when they differ."""
        found = {attributes["backend"] for attributes in self._mixers}
        return found.pop() if len(found) == 1 else None

    def _where(self) -> tuple[Any, ...]:
        """What assignments to ``parameter.data`` change, as conversions of a module make them."""
        return (
            list(map(Tensor.data_ptr, self._parameters)),
            self._parameters[0].dtype,
            list(map(Tensor.size, self._parameters)),
            list(map(Tensor.stride, self._square)),
        )


def _values(found: Sequence[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, found)))


def _hooks(modules: Sequence[nn.Module]) -> list[dict[int, Any]]:
    return [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def _replaced(attributes: Sequence[dict[str, Any]]) -> bool:
    """Whether a module got another method than that of its class."""
    return any(name in found for found in attributes for name in _METHODS)


def _make_plan(owner: nn.Module, layers: Callable[[Any], Layers | None]) -> _Plan | None:
    found = layers(owner)
    inner = list(owner.modules())[1:]
    if found is None or any(_hooks(inner)) or _replaced([m.__dict__ for m in (owner, *inner)]):
        return None
    pairs, last = found
    norms: list[Any] = [norm for norm, _ in pairs if norm is not None]
    norms += [] if last is None else [last]
    plain = all(type(norm) is nn.LayerNorm for norm in norms)
    if not plain or len({(norm.eps, norm.weight is None) for norm in norms}) > 1:
        return None
    weights = [_weights(norm, mixer) for norm, mixer in pairs]
    ending = _parameters({"weight": (last, "weight"), "bias": (last, "bias")})
    shapes = [[None if p is None else p.shape for p in layer] for layer in weights if layer]
    if len(shapes) < len(weights) or any(shape != shapes[0] for shape in shapes) or ending is None:
        return None
    first = next(layer for layer in weights if layer)
    if any(p is not None and p.shape != first.in_weight.shape[1:] for p in ending.values()):
        return None
    parameters = [p for m in (owner, *inner) for p in m._parameters.values() if p is not None]
    if not all(_plain(p) and p.is_contiguous() for p in parameters):
        return None
    stack = LayerStack(
        [layer for layer in weights if layer],
        (ending["weight"], ending["bias"]),
        norms[0].eps if norms else 0.0,
    )
    return _Plan(inner, owner, [mixer for _, mixer in pairs], stack)


def _parameters(places: dict[str, tuple[Any, str]]) -> dict[str, Any] | None:
    """Parameters by name, None where there is no module.

    None altogether where an attribute is something else than a parameter: that changes unseen.
    """
    found = {}
    for name, (module, attribute) in places.items():
        found[name] = None if module is None else getattr(module, attribute, None)
        if module is not None and found[name] is not module._parameters.get(attribute):
            return None
    return found


def _weights(norm: Any, mixer: Any) -> LayerWeights | None:
    """Parameters of a layer, or None where its modules are not the usual ones."""
    linear = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    if any(type(module) is not nn.Linear for module in linear):
        return None
    if type(mixer.conv1d) is not nn.Conv1d or mixer.x_proj.bias is not None:
        return None
    found = _parameters(
        {
            "norm_weight": (norm, "weight"),
            "norm_bias": (norm, "bias"),
            "in_weight": (mixer.in_proj, "weight"),
            "in_bias": (mixer.in_proj, "bias"),
            "conv_weight": (mixer.conv1d, "weight"),
            "conv_bias": (mixer.conv1d, "bias"),
            "x_weight": (mixer.x_proj, "weight"),
            "dt_weight": (mixer.dt_proj, "weight"),
            "dt_bias": (mixer.dt_proj, "bias"),
            "A_log": (mixer, "A_log"),
            "D": (mixer, "D"),
            "out_weight": (mixer.out_proj, "weight"),
            "out_bias": (mixer.out_proj, "bias"),
        }
    )
    if found is None or (norm is not None and found["norm_weight"] is None):
        return None
    layer = LayerWeights(**found)
    return layer if layer.fits() else None
