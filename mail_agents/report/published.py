"""Numbers that others published, for a table of their own beside ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mail_agents.report.settings import Setting
from mail_agents.report.tables import Rows


@dataclass(frozen=True)
class PublishedTable:
    """One published table of normalised scores.

    Attributes:
        name: Short name of the table.
        source: Where it was printed.
        checkpoint: Which checkpoint was scored: ``"last"``, ``"best"`` or ``"unstated"``.
        data: Versions of the datasets.
        seeds: Training seeds, or None where that is not stated.
        spread: What the number after ``±`` is; empty where there is none.
        note: What a reader must know before comparing; may be empty.
        scores: ``{agent: {dataset id: (mean, spread or None)}}``, in percent.
    """

    name: str
    source: str
    checkpoint: str
    data: str
    seeds: int | None
    spread: str
    note: str
    scores: Mapping[str, Mapping[str, tuple[float, float | None]]]


def match_dataset(name: str, ids: Sequence[str]) -> str | None:
    """Finds the published dataset with the name of ours.

    ``hopper-medium`` matches ``hopper-medium-v2``, but ``hopper-medium-v0`` does not.

    Args:
        name: Name of our dataset, with or without a version.
        ids: Ids with versions, for example those of a :class:`PublishedTable`.
    """
    if name in ids:
        return name
    return next((i for i in ids if i.rpartition("-v")[0] == name), None)


def published_rows(table: PublishedTable, settings: Sequence[Setting]) -> Rows | None:
    """One row per dataset of ours that the table knows, one column per published agent.

    Returns:
        The rows, headed by the published dataset's id; None when no dataset matches.
    """
    ids = list(dict.fromkeys(i for scores in table.scores.values() for i in scores))
    found = [match_dataset(setting.dataset, ids) for setting in settings]
    wanted = list(dict.fromkeys(i for i in found if i is not None))
    if not wanted:
        return None
    rows = []
    for dataset in wanted:
        cells = [_cell(scores.get(dataset)) for scores in table.scores.values()]
        rows.append((dataset, *cells))
    return Rows(("dataset", *table.scores), tuple(rows))


def facts(table: PublishedTable) -> str:
    """One sentence on how the table was made."""
    seeds = "an unstated number of seeds" if table.seeds is None else f"{table.seeds} seeds"
    checkpoint = {
        "last": "last checkpoint",
        "best": "best checkpoint, chosen by the evaluation itself",
    }.get(table.checkpoint, "unstated which checkpoint")
    spread = f", ± is the {table.spread}" if table.spread else ""
    return f"{table.source}. {table.data}; {seeds}, {checkpoint}{spread}. {table.note}".strip()


def foreign_datasets(settings: Sequence[Setting]) -> list[str]:
    """Datasets of ours that are not D4RL's, whatever their name, by the source of their scale."""
    names = [
        setting.dataset
        for setting in settings
        if setting.reference is None or not setting.reference.source.startswith("d4rl:")
    ]
    return list(dict.fromkeys(names))


def _cell(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return "none"
    mean, spread = score
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"
