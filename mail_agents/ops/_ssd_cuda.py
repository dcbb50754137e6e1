"""Adapter to the Triton kernels of the official ``mamba_ssm`` package.

``mamba_chunk_scan_combined`` of ``mamba_ssm/ops/triton/ssd_combined.py``, whose gradients are its
own. Importing it takes seconds, so that happens at the first call on a CUDA device.
"""

from typing import Any

import torch
from torch import Tensor

from mail_agents.ops._ssd_inputs import UNLIMITED, SsdInputs, step_sizes
from mail_agents.ops.backends import SSD_CUDA, probe, refuse_torch_func

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_STATE = 256
#: Lengths of a chunk, powers of two: kernels are tuned once for each, and mask what is left over.
_CHUNKS = (64, 128, 256)


def limits(inputs: SsdInputs) -> str | None:
    """Returns what the kernels cannot do about these inputs, or None."""
    if inputs.work_dtype() != torch.float32 or inputs.x.dtype not in _DTYPES:
        return f"the kernels take float32, float16 or bfloat16, not {inputs.x.dtype}"
    if inputs.B.shape[3] > _MAX_STATE:
        return f"the kernels take a state size up to {_MAX_STATE}, got {inputs.B.shape[3]}"
    if inputs.x.numel() == 0 or inputs.B.numel() == 0:
        return "the kernels take no empty inputs"
    return refuse_torch_func()


def run(inputs: SsdInputs) -> tuple[Tensor, Tensor | None]:
    """Runs the kernels on inputs that :func:`limits` accepts.

    Views of one projection are copied: their row stride is rarely the multiple of 8 that some of
    the kernels need.
    """
    dtype, length = inputs.x.dtype, inputs.x.shape[1]
    x, B, C = (t.to(dtype).contiguous() for t in (inputs.x, inputs.B, inputs.C))
    z = None if inputs.z is None else inputs.z.to(dtype).contiguous()
    A, D, bias, h0 = (
        None if t is None else t.float().contiguous()
        for t in (inputs.A, inputs.D, inputs.dt_bias, inputs.h0)
    )
    dt, softplus, limit = inputs.dt.contiguous(), inputs.dt_softplus, inputs.dt_limit
    if limit[0] > 0:  # the kernels would lift masked steps to the lower limit
        dt, bias = step_sizes(dt.float(), bias, softplus, limit), None
        softplus, limit = False, UNLIMITED
    sequence = None
    if inputs.reset is not None:
        # State is carried where the number of the sequence stays; the initial one belongs to 0.
        sequence = inputs.reset.cumsum(1, dtype=torch.int32)
    kernels: Any = probe(SSD_CUDA).module
    found = kernels.mamba_chunk_scan_combined(
        *(x, dt, A, B, C),
        chunk_size=next((size for size in _CHUNKS if size >= length), _CHUNKS[-1]),
        D=D,
        z=z,
        dt_bias=bias,
        initial_states=h0,
        seq_idx=sequence,
        dt_softplus=softplus,
        dt_limit=limit,
        return_final_states=inputs.return_state,
    )
    if not inputs.return_state:
        return found, None
    y, last = found
    return y, last.float()
