"""Embeddings of task instructions."""

import hashlib
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mail_agents.errors import InvalidInputError

_WORD = re.compile(r"[^\W_]+")


class HashEmbedder:
    """Deterministic text embeddings that need no download: a bag of hashed words and word pairs.

    Each word and each pair of neighbouring words gets a fixed vector of signs, taken from its
    SHAKE-256 digest; a text is their sum, scaled to about unit variance per dimension. Equal texts
    have equal embeddings on every machine, texts that share words are close, and unrelated texts
    are nearly orthogonal. It knows no synonyms: it is an offline stand-in for a pre-trained text
    encoder such as the CLIP text tower that the released MaIL uses (also 512 numbers per task).

    Args:
        dim: Length of an embedding.
    """

    def __init__(self, dim: int = 512) -> None:
        if dim < 1:
            raise InvalidInputError(f"An embedding needs dim >= 1; got {dim}.")
        self.dim = dim

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: Instructions or task names; case, punctuation and underscores do not matter.

        Returns:
            ``(len(texts), dim)`` float32.

        Raises:
            InvalidInputError: A text has no letter or digit, or a bare string was given.
        """
        if isinstance(texts, str):
            raise InvalidInputError(f"Give a list of texts, not the single text {texts!r}.")
        rows = [self._embed(text) for text in texts]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)

    def _embed(self, text: str) -> np.ndarray:
        words = _WORD.findall(text.casefold())
        if not words:
            raise InvalidInputError(f"Cannot embed {text!r}: it has no words. Give a task name.")
        grams = words + [f"{first} {second}" for first, second in pairwise(words)]
        total = np.sum([self._signs(gram) for gram in grams], axis=0)
        return (total / np.sqrt(len(grams))).astype(np.float32)

    def _signs(self, gram: str) -> np.ndarray:
        digest = hashlib.shake_256(gram.encode()).digest((self.dim + 7) // 8)
        bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[: self.dim]
        return 2.0 * bits - 1.0
