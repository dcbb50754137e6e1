"""Results of a benchmark: tables, bars and a chart, on the terminal, in files and in the docs."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from mail_agents.benchmarks.charts import Chart, draw
from mail_agents.errors import InvalidInputError, unknown_name
from mail_agents.storage import write_atomic

MISSING = "-"
BAR_HEADER = ("measurement", "measured", "bar", "result")
#: A table in a page of the docs: ``<!-- table: NAME -->``, the table, ``<!-- end of table -->``.
_MARKED = re.compile(r"(<!-- table: ([\w -]+?) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """A table as text; ``name`` is what the docs refer to it by."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table alone, without its title."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass(frozen=True)
class Bar:
    """A limit that a ratio has to keep.

    Attributes:
        text: What is measured.
        measured: The ratio, or None when something it needs did not run.
        required: The limit.
        at_most: Whether the limit is an upper one.
    """

    text: str
    measured: float | None
    required: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the limit was measured and kept."""
        if self.measured is None:
            return False
        if self.at_most:
            return self.measured <= self.required
        return self.measured >= self.required

    def row(self) -> tuple[str, ...]:
        """Cells under :data:`BAR_HEADER`."""
        sign = "≤" if self.at_most else "≥"
        if self.measured is None:
            return self.text, MISSING, f"{sign} {self.required:g}", "not measured"
        verdict = "met" if self.met else "**missed**"
        return self.text, f"{self.measured:.3g}", f"{sign} {self.required:g}", verdict


@dataclass
class Report:
    """Everything that one subject printed.

    Attributes:
        subject: Subcommand.
        settings: Its arguments.
        conditions: What ran on what, in words.
        tables: Results.
        bars: Limits; shown as one more table, named ``"<subject> bars"``.
        absent: Alternatives that did not run, with the reason and the command that installs them.
        notes: Further lines.
        charts: Figures.
        figures: All numbers behind the tables, for JSON.
    """

    subject: str
    settings: Mapping[str, Any]
    conditions: str
    tables: list[Table] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether every bar was met."""
        return all(bar.met for bar in self.bars)

    def all_tables(self) -> list[Table]:
        """The tables, with that of the bars."""
        if not self.bars:
            return self.tables
        rows = tuple(bar.row() for bar in self.bars)
        return [*self.tables, Table(f"{self.subject} bars", "Bars", BAR_HEADER, rows)]

    def markdown(self) -> str:
        """All tables with titles, and below them what was left out."""
        parts = [f"# {self.subject}\n\n{self.conditions}\n"]
        parts += [f"## {table.title}\n\n{table.markdown()}" for table in self.all_tables()]
        rest = [*self.notes, *(f"Not run: {line}" for line in self.absent)]
        return "\n".join([*parts, "".join(f"- {line}\n" for line in rest)])

    def show(self, console: Console) -> None:
        """Prints everything."""
        for table in self.all_tables():
            shown = RichTable(
                title=table.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False
            )
            for number, name in enumerate(table.header):
                shown.add_column(name, justify="right" if number else "left", overflow="fold")
            for row in table.rows:
                shown.add_row(*(cell.replace("**", "").replace("`", "") for cell in row))
            console.print(shown)
        for line in [self.conditions, *self.notes, *(f"Not run: {line}" for line in self.absent)]:
            console.print(line, markup=False, highlight=False)

    def write(self, folder: Path) -> list[Path]:
        """Writes ``<subject>.md``, ``.json`` and, for every chart, a PNG; returns the paths."""
        data = {
            "subject": self.subject,
            "conditions": self.conditions,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "tables": [asdict(table) for table in self.all_tables()],
            "bars": [asdict(bar) | {"met": bar.met} for bar in self.bars],
            "absent": self.absent,
            "notes": self.notes,
            "figures": self.figures,
        }
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        files = {f"{self.subject}.md": self.markdown(), f"{self.subject}.json": text}
        for name, content in files.items():
            write_atomic(folder / name, content.encode())
        written = [folder / name for name in files]
        for number, chart in enumerate(self.charts):
            extra = f"-{number + 1}" if number else ""
            written.append(draw(chart, folder / f"{self.subject}{extra}.png"))
        return written


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def times_row(
    label: str, seconds: Mapping[str, float], columns: Sequence[str], unit: str
) -> tuple[str, ...]:
    """A row with a time per column, and how many times that of column ``unit`` it is.

    Args:
        label: First cell.
        seconds: Seconds by column; columns that did not run are missing.
        columns: All columns after the first.
        unit: The column that counts as 1.
    """
    cells = []
    for name in columns:
        if name not in seconds:
            cells.append(MISSING)
        elif unit in seconds:
            cells.append(f"{duration(seconds[name])} ({seconds[name] / seconds[unit]:.3g}x)")
        else:
            cells.append(duration(seconds[name]))
    return label, *cells


def duration(seconds: float) -> str:
    """Three digits and a unit: ``"12.3 ms"``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"


def ratio(seconds: Mapping[str, float], slow: str, fast: str) -> float | None:
    """How many times faster ``fast`` is than ``slow``, or None when one of them did not run."""
    if slow not in seconds or fast not in seconds:
        return None
    return seconds[slow] / seconds[fast]


def load_tables(folder: Path) -> dict[str, Table]:
    """Tables by name, from every JSON file that :meth:`Report.write` left in a folder.

    Raises:
        InvalidInputError: There are none.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        for entry in json.loads(path.read_text(encoding="utf-8")).get("tables", ()):
            rows = tuple(tuple(row) for row in entry["rows"])
            table = Table(entry["name"], entry["title"], tuple(entry["header"]), rows)
            found[table.name] = table
    if not found:
        raise InvalidInputError(
            f"{folder} has no results. Write some: python scripts/benchmark.py ops "
            f"--output {folder}"
        )
    return found


def tables_in(page: str) -> dict[str, str]:
    """The text of every marked table of a Markdown page, by name."""
    return {match[2]: match[3] for match in _MARKED.finditer(page)}


def refresh(page: str, tables: Mapping[str, Table]) -> tuple[str, list[str], list[str]]:
    """Replaces the marked tables of a Markdown page by those that were measured.

    Returns:
        The new page, the names of the tables that were replaced, and of those without results.

    Raises:
        UnknownNameError: The page has no marked table.
    """
    replaced, kept = [], []

    def put(match: re.Match[str]) -> str:
        if match[2] not in tables:
            kept.append(match[2])
            return match[0]
        replaced.append(match[2])
        return f"{match[1]}\n{tables[match[2]].markdown()}\n{match[4]}"

    text = _MARKED.sub(put, page)
    if not replaced and not kept:
        raise unknown_name("marker", "<!-- table: NAME -->", (), "The page has no marked table.")
    return text, replaced, kept
