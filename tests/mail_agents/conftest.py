"""Tiny text models with random weights, made on the spot."""

from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = ("<bos>", "<eos>", "<unk>", "open", "close", "the", "door", "stove")
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _save_tokenizer(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>",
    ).save_pretrained(folder)


def _network(kind: str):
    import transformers as t

    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(WORDS)}
    if kind == "clip":
        text = TINY | ids | {"max_position_embeddings": 8}
        vision = TINY | {"image_size": 32, "patch_size": 16}
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    if kind == "bert":
        return t.BertModel(t.BertConfig(**TINY, **ids, max_position_embeddings=16))
    if kind == "gpt2":
        return t.GPT2Model(t.GPT2Config(**ids, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    return t.T5Model(t.T5Config(**ids, **small))


@pytest.fixture
def make_text_model(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a text model of a kind (clip, bert, gpt2, t5) to a folder, without any download."""
    pytest.importorskip("transformers")
    import torch

    def make(kind: str) -> Path:
        folder = tmp_path / kind
        _save_tokenizer(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _network(kind).save_pretrained(folder)
        return folder

    return make
