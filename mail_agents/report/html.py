"""The comparison as one HTML page: nothing is loaded from elsewhere and no script runs in it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import metadata, resources
from pathlib import Path
from platform import python_version
from typing import Any

from mail_agents.report import sections, summary, tables
from mail_agents.report.published import PublishedTable
from mail_agents.report.results import RunResult, Video, agents_of, task_names
from mail_agents.report.settings import Setting, settings_of
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
    published: Sequence[PublishedTable] = (),
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
        published: Tables of others; those that know one of the datasets stand in a section apart.

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
        sections.scores(results),
        sections.numbers(results),
        sections.targets(results),
        sections.profile(results),
        sections.pairs(results),
        sections.starts(results),
        _videos(results),
        sections.published(results, published),
        sections.curves(results),
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
    number, _, what = summary.noun(settings_of(results)).partition(" ")
    facts = {
        "agents": str(len(groups)),
        what if what.endswith("s") else f"{what}s": number,
        "training seeds": str(seeds),
        "evaluation episodes": f"{episodes:,}",
        "training time, all agents": tables.duration(training),
    }
    items = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'


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
    note = "Evaluation episodes as they were scored; a failure is shown where there was one."
    return sections.section("Rollouts", f"{note} {missing}".strip(), "".join(blocks))


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
    groups, settings = agents_of(results), settings_of(results)
    seeds = sorted({e["seed"] for r in results for t in r.tasks() for e in t.episodes})
    lines: dict[str, Any] = {
        "demonstrations": ", ".join(dict.fromkeys(run.dataset for run in results)),
        "training seeds": ", ".join(map(str, sorted({run.seed for run in results}))),
        "checkpoint": ", ".join(dict.fromkeys(n for r in results for n in r.evaluations)),
        "episodes per task and run": _span([t.n for run in results for t in run.tasks()]),
        "initial states": f"{len(seeds)} environment seeds, {seeds[0]} to {seeds[-1]}",
        **{f"references of {s.name}": s.scale for s in settings if s.reference},
        **extra,
    }
    for label, runs in groups.items():
        notes = dict.fromkeys(note for run in runs for note in run.notes)
        lines[label] = [_describe(runs), *_aims(runs, settings), *notes]
    lines["versions"] = ", ".join(f"{name} {v}" for name, v in versions().items())
    items = "".join(f"<dt>{escape(k)}</dt>{_values(v)}" for k, v in lines.items())
    code = f"<pre>{escape(chr(10).join(commands))}</pre>" if commands else ""
    heading = "<h2>How this was measured</h2>"
    again = '<p class="note">Made by:</p>' + code if code else ""
    return f'<section>{heading}<dl class="protocol">{items}</dl>{again}</section>'


def _values(value: Any) -> str:
    several = value if isinstance(value, list) else [value]
    return "".join(f"<dd>{escape(str(one))}</dd>" for one in several)


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _describe(runs: Sequence[RunResult]) -> str:
    run = runs[0]
    if not run.parameters:
        return f"{run.agent}, does not learn"
    parameters, updates, seconds = tables.cost_cells(runs)
    facts = [run.agent, f"{parameters} parameters"]
    facts.append(f"{updates} updates in {seconds}" if run.train_steps else "ready-made")
    facts += [
        f"{key} {run.config[key]}"
        for key in ("history", "horizon", "execute")
        if run.config.get(key) is not None
    ]
    return ", ".join(facts)


def _aims(runs: Sequence[RunResult], settings: Sequence[Setting]) -> list[str]:
    """The target returns behind the scores of an agent, by setting where they differ."""
    aims: dict[str, list[str]] = {}
    for setting in settings:
        found = [task for run in runs if (task := setting.find(run)) is not None]
        given = [e.get("target_return") for task in found for e in task.episodes]
        targets = {float(target) for target in given if target is not None}
        if targets:
            aims.setdefault(" or ".join(f"{t:g}" for t in sorted(targets)), []).append(setting.name)
    if len(aims) < 2:
        return [f"target return {target}" for target in aims]
    each = "; ".join(f"{target} ({', '.join(names)})" for target, names in aims.items())
    return [f"target returns {each}"]
