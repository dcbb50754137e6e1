import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from mail_agents.encoders.language import InstructionEmbedder, task_embedder
from mail_agents.encoders.text import TextEmbedder
from mail_agents.errors import InvalidInputError, MissingDependencyError


@pytest.fixture
def clip(make_text_model):
    return make_text_model("clip")


def test_features_are_the_projected_ones_of_the_text_tower(clip):
    import transformers

    texts = ["open the door", "close the stove"]
    rows = TextEmbedder(str(clip))(texts)
    assert rows.shape == (2, 12)
    assert rows.dtype == np.float32
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(clip)(texts, return_tensors="pt")
    with torch.inference_mode():
        expected = model.text_projection(model.text_model(**tokens).pooler_output)
    np.testing.assert_allclose(rows, expected.numpy(), atol=1e-6)


def test_a_text_tower_that_was_saved_alone_gives_the_same_features(make_text_model, tmp_path):
    import transformers

    whole = make_text_model("clip")
    model = transformers.CLIPModel.from_pretrained(whole)
    config = transformers.CLIPTextConfig(
        **model.config.text_config.to_dict() | {"projection_dim": 12}
    )
    tower = transformers.CLIPTextModelWithProjection(config)
    tower.load_state_dict(model.state_dict(), strict=False)
    alone = tmp_path / "alone"
    tower.save_pretrained(alone)
    transformers.AutoTokenizer.from_pretrained(whole).save_pretrained(alone)
    rows = [TextEmbedder(str(folder))(["open the door"]) for folder in (whole, alone)]
    np.testing.assert_allclose(*rows, atol=1e-6)


def test_a_text_has_the_same_numbers_in_any_company_and_random_streams_are_left_alone(clip):
    embed = TextEmbedder(str(clip))
    before = torch.get_rng_state()
    alone, among = embed(["open the door"]), embed(["the door", "open the door"])
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(alone[0], among[1])
    assert not np.array_equal(among[0], among[1])
    assert len(embed([])) == 0


def test_other_models_give_their_pooled_output(make_text_model):
    import transformers

    folder = make_text_model("bert")
    rows = TextEmbedder(str(folder))(["open the door"])
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        ["open the door"], return_tensors="pt"
    )
    with torch.inference_mode():
        np.testing.assert_allclose(rows, model(**tokens).pooler_output.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_models_without_a_vector_per_text_are_refused(make_text_model, kind):
    with pytest.raises(InvalidInputError, match="neither text features nor a pooled output"):
        TextEmbedder(str(make_text_model(kind)))(["open"])


def test_missing_weights_are_not_replaced_by_random_numbers(make_text_model):
    from safetensors.torch import load_file, save_file

    file = make_text_model("bert") / "model.safetensors"
    kept = {n: t.clone() for n, t in load_file(file).items() if "pooler" not in n}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(InvalidInputError, match=r"lacks weights.*pooler\.dense\.bias"):
        TextEmbedder(str(file.parent))(["open"])


def test_long_instructions_are_not_cut(clip):
    with pytest.raises(InvalidInputError, match=r"has 9 tokens.*reads at most 8"):
        TextEmbedder(str(clip))(["open the door open the door open"])


def test_models_that_cannot_be_had_are_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    embed = TextEmbedder("openai/clip-vit-base-patch32")
    with pytest.raises(InvalidInputError, match="HF_HUB_OFFLINE is set") as raised:
        embed(["open"])
    assert "hf download openai/clip-vit-base-patch32 --local-dir" in str(raised.value)
    assert "language='hash'" in str(raised.value)
    with pytest.raises(InvalidInputError, match="Did you mean 'hash'"):
        TextEmbedder("hsh")(["open"])


def test_a_local_folder_that_cannot_be_loaded_is_looked_into(clip, tmp_path):
    with pytest.raises(InvalidInputError, match=r"lacks config\.json; tok.* model\.") as e:
        TextEmbedder(str(tmp_path / "clip" / ".."))(["open"])
    assert "hf download" not in str(e.value)
    shutil.copytree(clip, tmp_path / "some")
    (tmp_path / "some" / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"The folder lacks model\.safetensors or pyt") as e:
        TextEmbedder(str(tmp_path / "some"))(["open"])
    assert "config.json" not in str(e.value).split("The folder lacks")[1]


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_never_run(clip, tmp_path, monkeypatch, capsys, known):
    ran = tmp_path / "ran"
    (clip / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import CLIPConfig, CLIPModel, CLIPTokenizer\n"
        "class C(CLIPConfig):\n    pass\n"
        "class M(CLIPModel):\n    config_class = C\n"
        "class T(CLIPTokenizer):\n    pass\n"
    )
    names = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", None]}
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((clip / file).read_text()) | {"auto_map": names}
        if not known:
            content |= {"tokenizer_class": "T", "model_type": "unheard_of"}
        (clip / file).write_text(json.dumps(content))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    if known:
        assert TextEmbedder(str(clip))(["open the door"]).shape == (1, 12)
    else:
        with pytest.raises(InvalidInputError, match="Python code, which is never run") as raised:
            TextEmbedder(str(clip))(["open the door"])
        assert "trust_remote_code=True" not in str(raised.value)
    assert not ran.exists()
    assert sys.stdin.read() == "y\n" * 9  # nobody asked
    assert not capsys.readouterr().out


def test_without_transformers_the_command_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mail-agents\[text\]'"):
        TextEmbedder("openai/clip-vit-base-patch32")(["open"])


def test_tasks_are_embedded_by_their_instruction_and_the_length_is_checked(clip):
    embed = task_embedder(str(clip), 12)
    assert isinstance(embed, InstructionEmbedder)
    named, said = (
        embed(["KITCHEN_SCENE3_open_the_door"]),
        TextEmbedder(str(clip))(["open the door"]),
    )
    np.testing.assert_array_equal(named, said)
    with pytest.raises(InvalidInputError, match=r"gives 12 numbers.*--config\.language-dim 12"):
        task_embedder(str(clip), 512)(["open_the_door"])


def test_broken_weights_are_refused():
    embed = InstructionEmbedder(lambda texts: np.full((len(texts), 2), np.nan), 2, "x")
    with pytest.raises(InvalidInputError, match="NaN"):
        embed(["a"])
