"""Which way up images are."""

import numpy as np

from mail_agents.features import Orientation

# Whether rows, and whether columns, are reversed with respect to an upright image.
_FLIPS = {"raw": (True, False), "upright": (False, False), "rot180": (False, True)}


def turn_images(images: np.ndarray, have: Orientation, want: Orientation) -> np.ndarray:
    """Turns images from one orientation into another.

    Args:
        images: ``(..., height, width, channels)``.
        have: ``"upright"``, first row at the top; ``"raw"``, first row at the bottom, as OpenGL and
            LIBERO's published files have it; or ``"rot180"``, what OpenVLA's training data call
            turned by 180 degrees: raw, rows and columns reversed, hence upright and mirrored left
            to right.
        want: Likewise.

    Returns:
        A view of ``images``.
    """
    rows, columns = (a != b for a, b in zip(_FLIPS[have], _FLIPS[want], strict=True))
    return images[..., :: -1 if rows else 1, :: -1 if columns else 1, :]
