"""Embeddings of instructions by a frozen text model of the ``transformers`` package."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mail_agents.errors import InvalidInputError, require, suggest

#: Names that are no models; for suggestions after a typing error.
_OTHERS = ("hash", "none")
#: Left out, transformers asks on the terminal whether it may run Python files of a model's folder.
_NO_CODE = {"trust_remote_code": False}
#: What a folder holds: one file of every group.
_FILES = (
    ("config.json",),
    ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model"),
    (
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ),
)


class TextEmbedder:
    """Features of a pre-trained text model, one vector per text.

    Models with a text tower (CLIP, SigLIP, or the tower alone, "...TextModelWithProjection") give
    their projected text features, which the released MaIL uses, not normalised; other models give
    their pooled output. The model is loaded when texts are embedded and released afterwards:
    making an embedder costs nothing.

    Args:
        model: Id on the Hugging Face hub, for example ``"openai/clip-vit-base-patch32"``, or a
            local folder. ``HF_HUB_OFFLINE=1`` is respected.
    """

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts, each alone, so that a text's numbers do not depend on its neighbours.

        Args:
            texts: Instructions.

        Returns:
            ``(len(texts), E)`` float32; E is a property of the model.

        Raises:
            MissingDependencyError: ``transformers`` is not installed.
            InvalidInputError: The model cannot be loaded or has no text features, or a text is
                longer than it reads.
        """
        transformers = require("transformers", "text", purpose=f"language={self.model!r}")
        # Loading draws random numbers for weights that a file lacks, and shows progress bars.
        with torch.random.fork_rng(devices=[]), _quiet(transformers):
            tokenizer, network = self._load(transformers)
            with torch.inference_mode():
                rows = [self._embed(tokenizer, network, text) for text in texts]
        return torch.stack(rows).numpy() if rows else np.empty((0, 0), np.float32)

    def _load(self, transformers: Any) -> tuple[Any, Any]:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model, **_NO_CODE)
            config = transformers.AutoConfig.from_pretrained(self.model, **_NO_CODE)
            kind = (config.architectures or [""])[0]
            # AutoModel would drop the projection of a tower that was saved alone.
            tower = kind if kind.endswith("TextModelWithProjection") else "AutoModel"
            network, info = getattr(transformers, tower).from_pretrained(
                self.model, output_loading_info=True, **_NO_CODE
            )
        except Exception as error:  # the hub, the files and the configuration fail in many ways
            raise self._unloadable(error) from error
        missing = sorted(info["missing_keys"])
        if missing:  # they would be random numbers
            raise InvalidInputError(
                f"The text model language={self.model!r} lacks weights that its features need: "
                f"{', '.join(missing[:4])} ({len(missing)} in all). Use a complete one, for "
                "example 'openai/clip-vit-base-patch32'."
            )
        return tokenizer, network.float().eval()

    def _embed(self, tokenizer: Any, network: Any, text: str) -> Tensor:
        tokens = tokenizer([text], return_tensors="pt")
        config = getattr(network.config, "text_config", network.config)
        longest = getattr(config, "max_position_embeddings", None)
        count = tokens["input_ids"].shape[1]
        if longest is not None and count > longest:
            raise InvalidInputError(
                f"The instruction {text[:60]!r}... has {count} tokens; the text model "
                f"{self.model!r} reads at most {longest}. Shorten it."
            )
        try:
            features = getattr(network, "get_text_features", network)(**tokens)
        except (TypeError, ValueError) as error:
            raise self._no_features(type(network).__name__) from error
        if not isinstance(features, Tensor):  # a record of outputs
            named = (getattr(features, name, None) for name in ("text_embeds", "pooler_output"))
            features = next((tensor for tensor in named if tensor is not None), None)
        if features is None:
            raise self._no_features(type(network).__name__)
        return features[0].float()

    def _unloadable(self, error: Exception) -> InvalidInputError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            # The library's own words advise to let the code run.
            reason = "its folder brings Python code, which is never run; use a model without."
        return InvalidInputError(
            f"Cannot load the text model language={self.model!r}.{suggest(self.model, _OTHERS)} "
            f"{type(error).__name__}: {reason} {self._advice()} language='hash' needs no model."
        )

    def _advice(self) -> str:
        folder = Path(self.model)
        if folder.exists():
            absent = [" or ".join(g) for g in _FILES if not any((folder / n).is_file() for n in g)]
            lacks = f"The folder lacks {'; '.join(absent)}. " if absent else ""
            return f"{lacks}Copy or download the whole model again into {folder.resolve()}."
        offline = "HF_HUB_OFFLINE is set, so nothing is downloaded. "
        return (
            (offline if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else "")
            + "Name a model of the Hugging Face hub, or a local folder with one, made where there "
            f"is a network: hf download {self.model} --local-dir FOLDER."
        )

    def _no_features(self, kind: str) -> InvalidInputError:
        return InvalidInputError(
            f"The model {self.model!r} ({kind}) has neither text features nor a pooled output. "
            "Use one with a text tower, for example 'openai/clip-vit-base-patch32'."
        )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silences loading reports and progress bars inside; warnings of others stay."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
