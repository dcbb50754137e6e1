import numpy as np
import pytest

from mail_baselines.published import load_published

TABLES = {table.name: table for table in load_published()}
LOCOMOTION = [
    f"{world}-{kind}-v2"
    for world in ("halfcheetah", "hopper", "walker2d")
    for kind in ("medium", "medium-replay", "medium-expert")
]


def average(table, agent):
    return float(np.mean([TABLES[table].scores[agent][name][0] for name in LOCOMOTION]))


@pytest.mark.parametrize(
    ("table", "agent", "printed"),
    [
        ("CORL, last checkpoint", "BC", 50.40),
        ("CORL, last checkpoint", "10% BC", 69.29),
        ("CORL, last checkpoint", "IQL", 81.63),
        ("CORL, last checkpoint", "DT", 73.84),
        ("CORL, best checkpoint", "BC", 70.15),
        ("CORL, best checkpoint", "DT", 77.49),
        ("Decision Transformer paper", "DT", 74.7),
        ("Decision Mamba paper (Ota)", "Decision Mamba (Ota)", 78.8),
        ("Decision Mamba paper (multi-grained)", "DM", 83.2),
        ("Decision Mamba paper (multi-grained)", "BC", 50.0),
        ("Decision Mamba paper (multi-grained)", "LaMo", 77.8),
        ("IQL paper", "IQL", 692.4 / 9),  # the sum that the paper prints
        ("IQL paper", "TD3+BC", 677.4 / 9),
    ],
)
def test_columns_have_the_average_that_was_printed(table, agent, printed):
    assert average(table, agent) == pytest.approx(printed, abs=0.06)


def test_every_table_says_where_it_comes_from():
    assert len(TABLES) == 6
    for table in TABLES.values():
        assert table.source
        assert table.data
        assert table.checkpoint in ("last", "best", "unstated")
        for column in table.scores.values():
            for mean, spread in column.values():
                assert -20 < mean < 250
                assert spread is None or spread >= 0


def test_golden_cells():
    last, best = TABLES["CORL, last checkpoint"], TABLES["CORL, best checkpoint"]
    assert last.scores["DT"]["hopper-medium-v2"] == (65.10, 1.61)
    assert best.scores["DT"]["maze2d-umaze-v1"] == (63.83, 17.35)
    assert last.scores["BC"]["relocate-cloned-v1"] == (-0.06, 0.01)
