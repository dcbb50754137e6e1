"""The comparison as one HTML page: nothing is loaded from elsewhere and no script runs in it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import metadata, resources
from pathlib import Path
from platform import python_version
from typing import Any

from mail_agents.report import charts, summary, tables
from mail_agents.report.results import RunResult, Video, agents_of, task_names
from mail_agents.report.tables import Rows
from mail_agents.storage import write_atomic

# A page much larger than this opens slowly and cannot be mailed.
_VIDEO_BUDGET = 60 * 2**20
_VERSIONS = ("mail-agents", "torch", "numpy", "gymnasium", "mujoco", "metaworld", "diffusers")


def write_report(
    results: Sequence[RunResult],
    path: str | Path,
    *,
    title: str = "Agent comparison",
    protocol: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Writes the comparison as one self-contained page.

    Args:
        results: All runs; every run needs an evaluation ``"last"``. Evaluations under other names
            (``"best"``) get a table of their own.
        path: HTML file to write; its folder is made.
        title: Name of the comparison, above the headline.
        protocol: More lines for the protocol box, such as the dataset's hash or the machine.
        commands: Commands that reproduce the page.
        notes: Sentences a reader must know before believing the numbers, such as "the networks have
            4 blocks instead of the paper's 8". They stand directly below the headline.

    Returns:
        The path.

    Raises:
        InvalidInputError: There are no runs, or one has no evaluation ``"last"``.
        StorageError: The page cannot be written; what was there stays.
    """
    head, _, rest = summary.headline(results).partition(". ")
    body = [
        f'<header><p class="kicker">{escape(title)}</p>',
        f"<h1>{escape(head.rstrip('.'))}.</h1>",
        f'<p class="lead">{escape(rest)}</p>' if rest else "",
        *(f'<p class="warning">{escape(note)}</p>' for note in notes),
        _facts(results),
        "</header>",
        _scores(results),
        _table_section(results),
        _pairs(results),
        _starts(results),
        _videos(results),
        _curves(results),
        _protocol(results, protocol or {}, commands),
    ]
    style = resources.files("mail_agents.report").joinpath("report.css").read_text("utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; media-src data:; img-src data:\">"
        f"<title>{escape(title)}</title>\n<style>\n{style}{_colour_rules(results)}</style></head>\n"
        f"<body><main>\n{chr(10).join(part for part in body if part)}\n"
        f"<footer>Made by mail-agents {escape(_version('mail-agents') or 'from source')}."
        "</footer></main></body></html>\n"
    )
    path = Path(path)
    write_atomic(path, page.encode())
    return path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, without importing them."""
    found = {name: _version(name) for name in _VERSIONS}
    return {"python": python_version(), **{name: v for name, v in found.items() if v}}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _colour_rules(results: Sequence[RunResult]) -> str:
    """CSS variables ``--a0``, ``--a1``, ... so that colours follow the reader's theme."""

    def rules(dark: bool) -> str:
        tints = summary.colours(results, dark).values()
        return " ".join(f"--a{i}: {tint};" for i, tint in enumerate(tints))

    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {rules(True)} }} }}"
    return f":root {{ {rules(False)} }}\n{dark}\n"


def _facts(results: Sequence[RunResult]) -> str:
    groups = agents_of(results)
    episodes = sum(task.n for run in results for task in run.tasks())
    training = sum(run.train_seconds for run in results)
    seeds = len({run.seed for run in results})
    facts = {
        "agents": str(len(groups)),
        "tasks": str(len(task_names(results))),
        "training seeds": str(seeds),
        "evaluation episodes": f"{episodes:,}",
        "training time, all agents": tables.duration(training),
    }
    items = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _scores(results: Sequence[RunResult]) -> str:
    names: list[str | None] = list(task_names(results))
    if len(names) > 1:
        names.insert(0, None)
    panels = "".join(charts.score_panel(results, name) for name in names)
    success = summary.is_success(results)
    what = "Success on unseen starts" if success else "Return on unseen starts"
    return (
        f"<section><h2>{what}</h2>"
        '<p class="note">The line on each bar is the 95 % interval: the range in which the true '
        "value plausibly lies, given this many episodes. Where intervals overlap widely, do not "
        f'read a ranking into the bars.</p><div class="panels">{panels}</div></section>'
    )


def _table_section(results: Sequence[RunResult]) -> str:
    names = list(dict.fromkeys(name for run in results for name in run.evaluations))
    blocks = []
    for name in names:
        evaluated = [run for run in results if name in run.evaluations]
        heading = f"<h3>Checkpoint: {escape(name)}</h3>" if len(names) > 1 else ""
        blocks.append(heading + _table(tables.score_rows(evaluated, name), evaluated))
    note = (
        "Brackets hold the 95 % interval: Wilson's for success rates, bootstrap for returns. Bold "
        "is the best of its column. Episodes of different training seeds are pooled; the "
        "interquartile mean (IQM), where shown, resamples seeds within tasks."
    )
    body = "".join(blocks)
    return f'<section><h2>All numbers</h2><p class="note">{note}</p>{body}</section>'


def _pairs(results: Sequence[RunResult]) -> str:
    found = summary.pairs(results)
    if not found:
        return ""
    sentences = "".join(f"<li>{escape(summary.verdict(pair))}</li>" for pair in found if pair.twin)
    note = (
        "Both agents of a pair met exactly the same starts, so only the episodes where they differ "
        "carry information. p is McNemar's exact test, corrected for the number of pairs (Holm); "
        "the interval is the adjusted Wald interval for paired rates and is not corrected. A twin "
        "has a Transformer in place of Mamba; sizes are in the table above. The leader was picked "
        "by these same episodes, which flatters its other comparisons a little."
    )
    return (
        f'<section><h2>Head to head</h2><p class="note">{note}</p>'
        f'<ul class="verdicts">{sentences}</ul>{_table(tables.pair_rows(results), ())}</section>'
    )


def _starts(results: Sequence[RunResult]) -> str:
    if not summary.is_success(results):
        return ""
    panels = "".join(charts.start_panel(results, task) for task in task_names(results))
    return (
        "<section><h2>Which starts are hard</h2>"
        '<p class="note">One square per evaluation episode, in the same order for every agent, and '
        "a line per training seed: filled is solved, empty is not. A column that is empty "
        "throughout is a start that nobody solved.</p>"
        f'<div class="panels narrow">{panels}</div></section>'
    )


def _curves(results: Sequence[RunResult]) -> str:
    panels = charts.curve_panels(results)
    if not panels:
        return ""
    return (
        "<section><h2>Training</h2>"
        '<p class="note">Training loss against updates, smoothed; with several seeds, their mean '
        "and range. Different objectives have different losses, so they do not share axes, and a "
        f'lower loss is not a better agent.</p><div class="curves">{panels}</div></section>'
    )


def _videos(results: Sequence[RunResult]) -> str:
    budget = _VIDEO_BUDGET
    blocks, left_out = [], 0
    for task in task_names(results):
        cards = []
        for run in results:
            for video in (v for v in run.videos if v.task == task):
                data = _read(video.path)
                if data is None or len(data) > budget:
                    left_out += 1
                    continue
                budget -= len(data)
                cards.append(_card(run, video, data))
        if cards:
            blocks.append(f'<h3>{escape(task)}</h3><div class="videos">{"".join(cards)}</div>')
    if not blocks and not left_out:
        return ""
    missing = f"{left_out} video(s) are missing or too large to embed." if left_out else ""
    return (
        "<section><h2>Rollouts</h2>"
        '<p class="note">Evaluation episodes as they were scored; a failure is shown where there '
        f"was one. {missing}</p>{''.join(blocks)}</section>"
    )


def _card(run: RunResult, video: Video, data: bytes) -> str:
    source = "data:video/mp4;base64," + base64.b64encode(data).decode("ascii")
    end = {
        True: '<span class="good">solved</span>',
        False: '<span class="bad">failed</span>',
        None: "",
    }[video.success]
    details = " · ".join(filter(None, [end, escape(video.caption)]))
    return (
        '<figure><video controls muted loop playsinline preload="metadata" '
        f'src="{source}"></video><figcaption><b>{escape(run.label)}</b><br>{details}</figcaption></figure>'
    )


def _read(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def _protocol(
    results: Sequence[RunResult], extra: Mapping[str, Any], commands: Sequence[str]
) -> str:
    groups = agents_of(results)
    seeds = sorted({e["seed"] for r in results for t in r.tasks() for e in t.episodes})
    lines: dict[str, Any] = {
        "demonstrations": ", ".join(dict.fromkeys(run.dataset for run in results)),
        "training seeds": ", ".join(map(str, sorted({run.seed for run in results}))),
        "checkpoint": ", ".join(dict.fromkeys(n for r in results for n in r.evaluations)),
        "episodes per task and run": _span([t.n for run in results for t in run.tasks()]),
        "initial states": f"{len(seeds)} environment seeds, {seeds[0]} to {seeds[-1]}",
        **extra,
    }
    for label, runs in groups.items():
        lines[label] = _describe(runs)
    lines["versions"] = ", ".join(f"{name} {v}" for name, v in versions().items())
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in lines.items())
    code = f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
    heading = "<h2>How this was measured</h2>"
    again = '<p class="note">Made by:</p>' + code if code else ""
    return f'<section>{heading}<dl class="protocol">{items}</dl>{again}</section>'


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _describe(runs: Sequence[RunResult]) -> str:
    run = runs[0]
    if not run.parameters:
        return f"{run.agent}, does not learn"
    parameters, updates, seconds = tables.cost_cells(runs)
    chunk = [
        f"{key} {run.config[key]}" for key in ("history", "horizon", "execute") if key in run.config
    ]
    return ", ".join(
        [run.agent, f"{parameters} parameters", f"{updates} updates in {seconds}", *chunk]
    )


def _table(table: Rows, results: Sequence[RunResult]) -> str:
    """Renders rows; with ``results``, each first cell carries its agent's colour."""
    tags = {label: i for i, label in enumerate(agents_of(results))} if results else {}
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = []
    for i, row in enumerate(table.rows):
        cells = []
        for j, cell in enumerate(row):
            main, bracket, interval = escape(cell).partition(" [")
            text = f"{main} <small>[{interval}</small>" if bracket else main
            if j == 0 and cell in tags:
                text = f'<span class="key" style="background: var(--a{tags[cell]})"></span>{text}'
            best = ' class="best"' if (i, j) in table.best else ""
            cells.append(f"<td{best}>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = "".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
