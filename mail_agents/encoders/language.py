"""Embeddings of instructions without a network."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from mail_agents.data.instructions import instruction
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


class InstructionEmbedder:
    """Embeds tasks by what their names say.

    Args:
        embed: Texts to ``(n, E)`` float32.
        dim: The E that the network was made for.
        model: Name of ``embed``, for messages.
        known: Embeddings ``(dim,)`` of tasks that need no further work.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[str]], np.ndarray],
        dim: int,
        model: str = "",
        known: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.embed = embed
        self.dim = dim
        self.model = model
        self.known = known or {}

    def __call__(self, tasks: Sequence[str]) -> np.ndarray:
        """Embeds the instructions of tasks as ``(len(tasks), dim)`` float32.

        Raises:
            InvalidInputError: The embeddings have another length than the network expects, or are
                not finite.
        """
        new = [task for task in tasks if task not in self.known]
        rows = self._new(new) if new else np.empty((0, self.dim), np.float32)
        found = dict(self.known) | dict(zip(new, rows, strict=True))
        return np.stack([found[task] for task in tasks]) if len(tasks) else rows

    def _new(self, tasks: Sequence[str]) -> np.ndarray:
        rows = self.embed([instruction(task) for task in tasks])
        if rows.shape[1] != self.dim:
            raise InvalidInputError(
                f"language={self.model!r} gives {rows.shape[1]} numbers per task, but the agent "
                f"was made for language_dim={self.dim}. Make it with "
                f"language_dim={rows.shape[1]} (scripts: --config.language-dim {rows.shape[1]})."
            )
        if not np.isfinite(rows).all():
            raise InvalidInputError(
                f"language={self.model!r} gives NaN or infinity: its weights are broken."
            )
        return rows


def task_embedder(
    language: str, dim: int, known: Mapping[str, np.ndarray] | None = None
) -> InstructionEmbedder | None:
    """Returns what embeds tasks; nothing is loaded before it is called.

    Args:
        language: ``"none"``, ``"hash"``, or a text model, see
            :class:`~mail_agents.encoders.text.TextEmbedder`.
        dim: Length of the embeddings.
        known: Embeddings of tasks that were made before.
    """
    if language == "none":
        return None
    if language == "hash":
        return InstructionEmbedder(HashEmbedder(dim), dim, language, known)
    from mail_agents.encoders.text import TextEmbedder  # imports torch

    return InstructionEmbedder(TextEmbedder(language), dim, language, known)
