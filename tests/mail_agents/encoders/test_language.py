import numpy as np
import pytest

from mail_agents.encoders.language import (
    HashEmbedder,
    InstructionEmbedder,
    task_embedder,
)
from mail_agents.errors import InvalidInputError


def test_values_are_fixed_for_ever():
    # Trained artifacts hold embeddings, but new tasks are embedded anew: values must not drift.
    out = HashEmbedder()(["open the drawer"])
    assert out.shape == (1, 512)
    assert out.dtype == np.float32
    # Three words and two pairs: sums of five signs over sqrt(5).
    np.testing.assert_allclose(np.unique(np.abs(out) * np.sqrt(5)), [1, 3, 5], rtol=1e-6)
    np.testing.assert_allclose(out[0, :8] * np.sqrt(5), [-1, -1, -1, 5, 3, 1, 1, 3], rtol=1e-6)


def test_similar_tasks_are_close_and_unrelated_ones_nearly_orthogonal():
    embed = HashEmbedder(2048)
    a, b, c = embed(["pick up the red cup", "pick up the blue cup", "close a window"])

    def cosine(x, y):
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    assert cosine(a, b) > 0.5
    assert abs(cosine(a, c)) < 0.1
    assert a.var() == pytest.approx(1.0, abs=0.15)


def test_word_order_matters_and_case_and_punctuation_do_not():
    a, b, c = HashEmbedder(64)(["put A on B", "put B on A", "Put_a  on-b."])
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(a, c)


def test_bad_texts_are_refused():
    with pytest.raises(InvalidInputError, match="no words"):
        HashEmbedder()(["..."])
    with pytest.raises(InvalidInputError, match="list of texts"):
        HashEmbedder()("reach-v3")
    assert HashEmbedder(8)([]).shape == (0, 8)


def test_known_tasks_are_not_embedded_again():
    asked = []

    def embed(texts):
        asked.extend(texts)
        return np.zeros((len(texts), 2), np.float32)

    embedder = InstructionEmbedder(embed, 2, known={"a_b": np.ones(2, np.float32)})
    assert embedder(["c_d", "a_b"]).tolist() == [[0, 0], [1, 1]]
    assert asked == ["c d"]
    assert embedder([]).shape == (0, 2)


def test_hashed_embeddings_of_names_are_those_of_their_words():
    embed = task_embedder("hash", 64)
    (row,) = embed(["open_the_drawer"])
    np.testing.assert_array_equal(row, HashEmbedder(64)(["open the drawer"])[0])
    assert task_embedder("none", 64) is None


def test_making_a_text_embedder_loads_nothing():
    assert task_embedder("no/such-model", 512) is not None
