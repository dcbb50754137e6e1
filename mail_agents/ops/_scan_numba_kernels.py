"""Jitted loops of the selective scan; importing this module imports numba.

One loop over channels is one vector loop: exponentials are polynomials written out, because calls
into the mathematical library keep a compiler from vectorising. Arrays are float32 and contiguous:
``u``, ``delta``, ``z`` (B, L, D), ``B``, ``C`` (B, L, N), ``A`` (N, D), states (B, N, D); the
states that the forward pass keeps are (chunks - 1, B, N, D). An input that is absent has size zero.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from mail_agents.ops._user_cache import cache_directory

logger = logging.getLogger(__name__)
# Its attributes are made at run time.
_config: Any = numba.config  # pyright: ignore[reportPrivateImportUsage]

#: Steps between the states that the forward pass keeps for the backward pass.
CHUNK = 32
#: Elements of decays, and of states, that the backward pass holds: both stay in the cache.
_TILE = 2**16
#: Channels of a block.
_MIN_BLOCK, _MAX_BLOCK = 32, 128

_ZERO, _ONE, _TWO, _HALF = (np.float32(x) for x in (0, 1, 2, 0.5))
_LOG2E = np.float32(1.4426950408889634)
_THRESHOLD = np.float32(20)  # softplus is the identity above, as in torch
_MIN_EXPONENT, _MAX_EXPONENT = np.float32(-126), np.float32(128)
#: Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
_ROUND, _BIAS = np.float32(12582912), np.int32(127)
#: 2^f = 1 + f P(f) on [-1/2, 1/2]: relative minimax, and exactly 1 at 0, so that a state that does
#: not decay stays as it is.
_P0, _P1, _P2, _P3, _P4 = (
    np.float32(c) for c in (0.693147004, 0.240222424, 0.0555073358, 0.00967151299, 0.00132647285)
)
#: log(1 + w) = 2 s Q(s^2) with s = w / (2 + w), for w in [0, 1]: relative minimax.
_Q0, _Q1, _Q2, _Q3, _Q4 = (
    np.float32(c) for c in (1.0, 0.333331585, 0.200124547, 0.139803007, 0.140891686)
)


def _cache_folder() -> str | None:
    """Where numba keeps what it compiled: in the user's cache and not next to this file."""
    if _config.CACHE_DIR:  # NUMBA_CACHE_DIR
        return _config.CACHE_DIR
    try:
        folder = cache_directory("numba")
    except (OSError, RuntimeError) as error:
        logger.info("numba compiles in every process, it has no cache: %s", error)
        return None
    if not os.access(folder, os.W_OK):
        logger.info("numba compiles in every process, %s cannot be written to", folder)
        return None
    return str(folder)


_CACHE = _cache_folder()


def _jit(cache: bool = False, fastmath: frozenset[str] = frozenset({"contract"})) -> Any:
    """Decorator; "contract" makes one instruction of a * b + c, NaN and infinity keep a meaning."""

    def decorate(function: Callable[..., Any]) -> Any:
        before = _config.CACHE_DIR
        _config.CACHE_DIR = _CACHE or before  # read when a function is declared
        try:
            return numba.njit(
                nogil=True,
                fastmath=set(fastmath),
                error_model="numpy",
                cache=cache and _CACHE is not None,
            )(function)
        finally:
            _config.CACHE_DIR = before

    return decorate


@_jit()
def _exp2(x: Any) -> Any:
    """2^x: zero below -126, infinity above 128, NaN stays."""
    clamped = _MAX_EXPONENT if x > _MAX_EXPONENT else x
    clamped = _MIN_EXPONENT if clamped < _MIN_EXPONENT else clamped
    shifted = clamped + _ROUND
    f = clamped - (shifted - _ROUND)
    bits = np.float32(shifted).view(np.int32)
    scale = np.int32((bits + _BIAS) << np.int32(23)).view(np.float32)
    p = _P0 + f * (_P1 + f * (_P2 + f * (_P3 + f * _P4)))
    return _ZERO if x < _MIN_EXPONENT else scale * (_ONE + f * p)


@_jit()
def _sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + _exp2(-_LOG2E * x))


@_jit()
def _softplus(x: Any) -> Any:
    w = _exp2(-_LOG2E * abs(x))
    s = w / (_TWO + w)
    v = s * s
    log1p = _TWO * s * (_Q0 + v * (_Q1 + v * (_Q2 + v * (_Q3 + v * _Q4))))
    positive = _ZERO if x < _ZERO else x
    return x if x > _THRESHOLD else positive + log1p


class Arrays(NamedTuple):
    """Inputs; ``A2`` is ``A`` scaled by log2(e). Absent: D, bias (0,), z, h0 (0, 0, 0), reset."""

    u: Any
    delta: Any
    A: Any
    A2: Any
    B: Any
    C: Any
    D: Any
    z: Any
    bias: Any
    h0: Any
    reset: Any


class Gradients(NamedTuple):
    """Gradients of the inputs. Those without a batch axis, and of B and C, are added to."""

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    bias: Any
    h0: Any


@_jit()
def _block_size(length: int, n: int, d: int) -> int:
    fits = _TILE // max(1, min(length, CHUNK) * n) // 16 * 16
    return max(1, min(d, max(_MIN_BLOCK, min(_MAX_BLOCK, fits))))


@_jit()
def _prepare(u: Any, delta: Any, D: Any, bias: Any, softplus: bool, dt: Any, x: Any, y: Any) -> Any:
    """Step sizes, scaled inputs and the skip connection of one step and block of channels."""
    for d in range(dt.shape[0]):
        dt[d] = delta[d]
    if bias.shape[0]:
        for d in range(dt.shape[0]):
            dt[d] += bias[d]
    if softplus:
        for d in range(dt.shape[0]):
            dt[d] = _softplus(dt[d])
    for d in range(dt.shape[0]):
        x[d] = dt[d] * u[d]
        y[d] = _ZERO
    if D.shape[0]:
        for d in range(dt.shape[0]):
            y[d] = D[d] * u[d]


@_jit()
def _advance(dt: Any, x: Any, A2: Any, start: int, B: Any, C: Any, h: Any, y: Any) -> None:
    """One step for the channels from ``start`` on: changes ``h`` (N, block), adds to ``y``."""
    for n in range(h.shape[0]):
        a, state, b, c = A2[n, start : start + y.shape[0]], h[n], B[n], C[n]
        for d in range(y.shape[0]):
            new = _exp2(dt[d] * a[d]) * state[d] + x[d] * b
            state[d] = new
            y[d] += c * new


@_jit()
def _advance_keeping(
    dt: Any,
    x: Any,
    A2: Any,
    start: int,
    B: Any,
    C: Any,
    fresh: bool,
    old: Any,
    decay: Any,
    new: Any,
    y: Any,
) -> None:
    """As :func:`_advance`, from ``old`` to ``new``; writes decays too, zero where ``fresh``."""
    for n in range(old.shape[0]):
        a, before, e, after = A2[n, start : start + y.shape[0]], old[n], decay[n], new[n]
        b, c = B[n], C[n]
        for d in range(y.shape[0]):
            factor = _ZERO if fresh else _exp2(dt[d] * a[d])
            state = factor * before[d] + x[d] * b
            e[d] = factor
            after[d] = state
            y[d] += c * state


@_jit()
def _gate(gate: Any, y: Any) -> None:
    for d in range(y.shape[0]):
        y[d] *= gate[d] * _sigmoid(gate[d])


@_jit(cache=True)
def forward(
    arrays: Any, softplus: bool, first: int, stop: int, kept: Any, out: Any, last: Any
) -> None:
    """Writes ``out`` (B, L, D), ``last`` and, if not empty, ``kept`` of rows ``first`` to ``stop``.

    Releases the interpreter lock; calls for different rows may run at the same time.
    """
    u, delta, _, A2, B, C, D, z, bias, h0, reset = arrays
    length, width, n = u.shape[1], u.shape[2], A2.shape[0]
    block = max(1, min(width, _MAX_BLOCK))
    dts, xs = np.empty(block, np.float32), np.empty(block, np.float32)
    h = np.empty((n, block), np.float32)
    for row in range(first, stop):
        for start in range(0, width, block):
            end = min(width, start + block)
            skip, shift = D[start:end], bias[start:end]
            dt, x = dts[: end - start], xs[: end - start]
            h[:] = _ZERO
            if h0.size:
                h[:, : end - start] = h0[row, :, start:end]
            for t in range(length):
                if kept.size and t and t % CHUNK == 0:
                    kept[t // CHUNK - 1, row, :, start:end] = h[:, : end - start]
                if reset.size and reset[row, t]:
                    h[:] = _ZERO
                y = out[row, t, start:end]
                _prepare(
                    u[row, t, start:end], delta[row, t, start:end], skip, shift, softplus, dt, x, y
                )
                _advance(dt, x, A2, start, B[row, t], C[row, t], h, y)
                if z.size:
                    _gate(z[row, t, start:end], y)
            last[row, :, start:end] = h[:, : end - start]


@_jit()
def _gate_backward(dout: Any, y: Any, gate: Any, dy: Any, dgate: Any) -> None:
    """Cotangents of the ungated output and of the gate."""
    for d in range(dy.shape[0]):
        sigmoid = _sigmoid(gate[d])
        dy[d] = dout[d] * gate[d] * sigmoid
        dgate[d] = dout[d] * y[d] * sigmoid * (_ONE + gate[d] * (_ONE - sigmoid))


# Sums over channels become vector sums; nothing here relies on how a sum is rounded.
@_jit(fastmath=frozenset({"contract", "reassoc", "nsz"}))
def _retreat(
    dt: Any,
    x: Any,
    dy: Any,
    A: Any,
    start: int,
    B: Any,
    C: Any,
    before: Any,
    decay: Any,
    after: Any,
    g: Any,
    dA: Any,
    dB: Any,
    dC: Any,
    dx: Any,
    ddt: Any,
) -> None:
    """The transpose of :func:`_advance`: changes ``g``, the cotangent of the state."""
    for n in range(g.shape[0]):
        carry, e, old, new = g[n], decay[n], before[n], after[n]
        a, da = A[n, start : start + dy.shape[0]], dA[n, start : start + dy.shape[0]]
        b, c, sum_b, sum_c = B[n], C[n], _ZERO, _ZERO
        for d in range(dy.shape[0]):
            cotangent = carry[d] + dy[d] * c
            sum_c += dy[d] * new[d]
            sum_b += x[d] * cotangent
            dx[d] += b * cotangent
            flow = cotangent * e[d]
            inner = flow * old[d]
            ddt[d] += inner * a[d]
            da[d] += inner * dt[d]
            carry[d] = flow
        dB[n] += sum_b
        dC[n] += sum_c


@_jit()
def _inputs_backward(
    u: Any,
    delta: Any,
    D: Any,
    bias: Any,
    softplus: bool,
    dt: Any,
    dy: Any,
    dx: Any,
    ddt: Any,
    du: Any,
    ddelta: Any,
    dD: Any,
    dbias: Any,
) -> None:
    """The transpose of :func:`_prepare`."""
    for d in range(dt.shape[0]):
        du[d] = dx[d] * dt[d]
        ddelta[d] = ddt[d] + dx[d] * u[d]
    if D.shape[0]:
        for d in range(dt.shape[0]):
            du[d] += dy[d] * D[d]
            dD[d] += dy[d] * u[d]
    if softplus:
        for d in range(dt.shape[0]):
            raw = delta[d] + bias[d] if bias.shape[0] else delta[d]
            ddelta[d] *= _ONE if raw > _THRESHOLD else _sigmoid(raw)
    if bias.shape[0]:
        for d in range(dt.shape[0]):
            dbias[d] += ddelta[d]


@_jit(cache=True)
def backward(
    arrays: Any,
    softplus: bool,
    first: int,
    stop: int,
    kept: Any,
    dout: Any,
    dlast: Any,
    gradients: Any,
) -> None:
    """Writes gradients of rows ``first`` to ``stop``; ``dlast`` (B, N, D) may be empty."""
    u, delta, A, A2, B, C, D, z, bias, h0, reset = arrays
    length, width, n = u.shape[1], u.shape[2], A.shape[0]
    block, steps = _block_size(length, n, width), min(length, CHUNK)
    states = np.empty((steps + 1, n, block), np.float32)
    decays = np.empty((steps, n, block), np.float32)
    rows = np.empty((4, steps, block), np.float32)
    dts, xs, ys, dys = rows[0], rows[1], rows[2], rows[3]
    dxs, ddts = np.empty(block, np.float32), np.empty(block, np.float32)
    g = np.empty((n, block), np.float32)
    for row in range(first, stop):
        for start in range(0, width, block):
            end = min(width, start + block)
            size = end - start
            skip, shift = D[start:end], bias[start:end]
            dD, dbias = gradients.D[start:end], gradients.bias[start:end]
            dx, ddt = dxs[:size], ddts[:size]
            g[:] = _ZERO
            if dlast.size:
                g[:, :size] = dlast[row, :, start:end]
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                base = chunk * CHUNK
                count = min(length - base, CHUNK)
                states[0] = _ZERO
                if chunk:
                    states[0, :, :size] = kept[chunk - 1, row, :, start:end]
                elif h0.size:
                    states[0, :, :size] = h0[row, :, start:end]
                for i in range(count):
                    t = base + i
                    now, raw = u[row, t, start:end], delta[row, t, start:end]
                    dt, x, y, dy = dts[i, :size], xs[i, :size], ys[i, :size], dys[i, :size]
                    _prepare(now, raw, skip, shift, softplus, dt, x, y)
                    fresh = reset.size > 0 and reset[row, t]
                    _advance_keeping(
                        *(dt, x, A2, start, B[row, t], C[row, t], fresh),
                        *(states[i], decays[i], states[i + 1], y),
                    )
                    dy[:] = dout[row, t, start:end]
                    if z.size:
                        gate, dgate = z[row, t, start:end], gradients.z[row, t, start:end]
                        _gate_backward(dout[row, t, start:end], y, gate, dy, dgate)
                for i in range(count - 1, -1, -1):
                    t = base + i
                    dt, x, dy = dts[i, :size], xs[i, :size], dys[i, :size]
                    dx[:] = _ZERO
                    ddt[:] = _ZERO
                    _retreat(
                        *(dt, x, dy, A, start, B[row, t], C[row, t]),
                        *(states[i], decays[i], states[i + 1], g, gradients.A),
                        *(gradients.B[row, t], gradients.C[row, t], dx, ddt),
                    )
                    _inputs_backward(
                        *(u[row, t, start:end], delta[row, t, start:end], skip, shift, softplus),
                        *(dt, dy, dx, ddt),
                        *(gradients.u[row, t, start:end], gradients.delta[row, t, start:end]),
                        *(dD, dbias),
                    )
            if h0.size:
                gradients.h0[row, :, start:end] = g[:, :size]
