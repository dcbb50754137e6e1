"""One integer seeds everything: independent, named streams from a single root seed."""

import numpy as np

from mail_agents.errors import InvalidInputError, unknown_name

#: Streams of the tree. The order is part of the format: append only.
STREAMS = ("train", "data", "eval", "model")


def derive_seed(seed: int, stream: str, *path: int) -> int:
    """Derives a 63-bit seed from the root seed, a named stream and a path of indices.

    The result depends on nothing else (not on how many seeds were drawn before), so episode ``i``
    of an evaluation has the same seed whatever the number of parallel environments.

    Args:
        seed: Root seed, a non-negative integer.
        stream: One of :data:`STREAMS`.
        path: Indices below the stream, for example the episode index.

    Raises:
        UnknownNameError: The stream does not exist.
        InvalidInputError: A number is negative.
    """
    if stream not in STREAMS:
        raise unknown_name("random stream", stream, STREAMS)
    if min(seed, *path, 0) < 0:
        raise InvalidInputError(f"Seeds and indices must not be negative; got {(seed, *path)}.")
    key = (STREAMS.index(stream), *path)
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=key)
    low, high = sequence.generate_state(2, np.uint32).tolist()
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def derive_env_seed(seed: int, stream: str, *path: int) -> int:
    """Like :func:`derive_seed`, but 31 bits, the range every simulator accepts for ``reset``."""
    return derive_seed(seed, stream, *path) & 0x7FFFFFFF
