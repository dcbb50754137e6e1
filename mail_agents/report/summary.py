"""What the numbers say, in words and pairs: shared by the tables, the figures and the HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

from mail_agents.report import estimates, stats
from mail_agents.report.results import RunResult, agents_of
from mail_agents.report.settings import Measure, Setting, averageable, overall_measure, settings_of
from mail_agents.report.stats import Estimate, PairedResult

# Okabe and Ito's colour-blind safe palette, without yellow (unreadable on white), and four of
# Tol's, in the order in which agents appear. An agent that does not learn is grey.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#AA4499", "#C28A00", "#56B4E9",
    "#882255", "#44AA99", "#6E6A00", "#4B3FA8", "#C9546C", "#117733",
)  # fmt: skip
#: The same hues, lighter, for a dark page.
PALETTE_DARK = (
    "#5AB0EA", "#FF8F4D", "#2FCB9E", "#DE86CD", "#EFC04A", "#9AD4F7",
    "#D9709F", "#7FD6CB", "#C4BE4A", "#9C93F0", "#F28DA0", "#63C17F",
)  # fmt: skip
GREY = "#7A7F87"


@dataclass(frozen=True)
class Pair:
    """Two agents compared on the episodes they share.

    Attributes:
        first: Label of the first agent.
        second: Label of the second.
        twin: Whether they differ only in the sequence model (Mamba against Transformer).
        result: Counts, difference and exact p-value.
        adjusted_p: The p-value after Holm's correction for all pairs reported together.
    """

    first: str
    second: str
    twin: bool
    result: PairedResult
    adjusted_p: float


def twin_of(agent: str) -> str | None:
    """The registry id that differs only by a Transformer in place of Mamba, or None.

    ``mail/ed-ma-bc`` gives ``mail/ed-tr-bc``.
    """
    namespace, slash, name = agent.rpartition("/")
    parts = name.split("-")
    if "ma" not in parts:
        return None
    return namespace + slash + "-".join("tr" if part == "ma" else part for part in parts)


def colours(results: Sequence[RunResult], dark: bool = False) -> dict[str, str]:
    """One colour per label, the same in every figure made from the same results."""
    palette = PALETTE_DARK if dark else PALETTE
    chosen, used = {}, 0
    for label, runs in agents_of(results).items():
        learns = any(run.parameters for run in runs)
        chosen[label] = palette[used % len(palette)] if learns else GREY
        used += learns
    return chosen


def is_success(results: Sequence[RunResult], which: str = "last") -> bool:
    """Whether all episodes say if they succeeded, so that scores are success rates."""
    return all(task.has_success for run in results for task in run.tasks(which))


def noun(settings: Sequence[Setting]) -> str:
    """Names what the settings are, with their number: ``6 tasks`` or ``10 datasets``."""
    datasets = len({setting.dataset for setting in settings})
    if all(setting.name == setting.dataset for setting in settings):
        return _count(datasets, "dataset")
    if datasets == 1:
        return _count(len(settings), "task")
    return f"{_count(len(settings), 'task')} of {_count(datasets, 'dataset')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def format_score(estimate: Estimate, measure: Measure, *, interval: bool = True) -> str:
    """Writes ``97 % [89, 99]`` for a success rate, else ``55.3 ± 2.1`` or ``55.3 [50.1, 60.0]``.

    The number after ``±`` is the standard deviation over training seeds.
    """
    if measure == "success":
        text = f"{100 * estimate.value:.0f} %"
        bounds = f" [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"
    elif estimate.spread is not None:
        text, bounds = f"{estimate.value:.1f}", f" ± {estimate.spread:.1f}"
    else:
        text, bounds = f"{estimate.value:.1f}", f" [{estimate.low:.1f}, {estimate.high:.1f}]"
    return text + bounds if interval else text


def format_points(share: float) -> str:
    """Writes a difference of rates in points, ``+7``, ``-4`` or ``0``."""
    points = round(100 * share)
    return f"{points:+d}" if points else "0"


def format_p(p: float) -> str:
    """Writes ``p = 0.34`` or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def ranking(results: Sequence[RunResult], which: str = "last") -> list[tuple[str, Estimate]]:
    """Labels with their score over all settings, best first; without incomplete agents."""
    settings = settings_of(results, which)
    scores = [
        (label, score)
        for label, runs in agents_of(results).items()
        if (score := estimates.overall(runs, settings, which)) is not None
    ]
    return sorted(scores, key=lambda item: -item[1].value)


def pairs(results: Sequence[RunResult], which: str = "last") -> list[Pair]:
    """Every agent against its Transformer twin, then the leader against the others.

    Empty in a world without success. Leaves out agents that do not learn, whose distance needs no
    test, and agents that share no episodes.
    """
    if not is_success(results, which):
        return []
    learned = [run for run in results if run.parameters]
    if not learned:
        return []
    groups = agents_of(learned)
    label_of = {runs[0].agent: label for label, runs in groups.items()}
    chosen: list[tuple[str, str, bool]] = []
    for label, runs in groups.items():
        twin = label_of.get(twin_of(runs[0].agent) or "")
        if twin:
            chosen.append((label, twin, True))
    best = next((label for label, _ in ranking(learned, which)), None)
    seen = {frozenset(pair[:2]) for pair in chosen}
    if best is not None:
        rest = [label for label in groups if frozenset((best, label)) not in seen]
        chosen += [(best, label, False) for label in rest if label != best]
    compared: list[tuple[str, str, bool, PairedResult]] = []
    for first, second, twin in chosen:
        if _episodes(groups[first], which) & _episodes(groups[second], which):
            result = estimates.compare_paired(groups[first], groups[second], which)
            compared.append((first, second, twin, result))
    adjusted = stats.holm([result.p_value for *_, result in compared])
    return [Pair(*row, adjusted_p=p) for row, p in zip(compared, adjusted, strict=True)]


def _episodes(runs: Sequence[RunResult], which: str) -> set[tuple]:
    return {
        (run.dataset, run.seed, task.task, episode["index"], episode["seed"])
        for run in runs
        for task in run.tasks(which)
        for episode in task.episodes
    }


def headline(results: Sequence[RunResult], which: str = "last") -> str:
    """A few sentences computed from the data: who leads, by how much, and how sure that is."""
    settings = settings_of(results, which)
    groups = agents_of(results)
    order = ranking(results, which)
    if not order:
        return _leaders(groups, settings, which)
    text = _lead(order, overall_measure(settings), settings, groups, which)
    unranked = [label for label in groups if label not in dict(order)]
    if unranked:
        text += f" Not ranked, because runs of them are missing: {', '.join(unranked)}."
    twins = [pair for pair in pairs(results, which) if pair.twin]
    return " ".join([text, *(verdict(pair) for pair in twins)])


def _lead(
    order: list[tuple[str, Estimate]],
    measure: Measure,
    settings: Sequence[Setting],
    groups: dict[str, list[RunResult]],
    which: str,
) -> str:
    best, score = order[0]
    tied = [label for label, other in order if other.value == score.value]
    names, alone = _listed(tied), len(tied) == 1
    if measure == "success":
        solved, n = estimates.counts(groups[best], which=which)
        text = (
            f"{names} {'solves' if alone else 'each solve'} {solved} of {n} unseen episodes on "
            f"{noun(settings)} ({100 * score.value:.0f} %, 95 % interval {100 * score.low:.0f} to "
            f"{100 * score.high:.0f} %)"
        )
    else:
        what = "normalised score" if measure == "score" else "return"
        sure = (
            f"95 % interval {score.low:.1f} to {score.high:.1f}"
            if score.spread is None
            else f"± {score.spread:.1f} over {_count(len({r.seed for r in groups[best]}), 'seed')}"
        )
        text = (
            f"{names} {'reaches' if alone else 'each reach'} a mean {what} of {score.value:.1f} on "
            f"{noun(settings)} ({sure})"
        )
    if len(order) == len(tied):
        return f"{text}."
    text += f", the most of the {len(order)} agents"
    if measure != "success":
        label, runner_up = order[len(tied)]
        text += f"; next is {label} with {format_score(runner_up, measure)}"
    return f"{text}."


def _leaders(groups: dict[str, list[RunResult]], settings: Sequence[Setting], which: str) -> str:
    """Who leads most settings, where no mean over them exists."""
    wins = dict.fromkeys(groups, 0)
    for setting in settings:
        scores = {
            label: score.value
            for label, runs in groups.items()
            if (score := estimates.estimate(runs, setting, which)) is not None
        }
        for label, value in scores.items():
            wins[label] += value == max(scores.values())
    most = max(wins.values())
    names = [label for label, count in wins.items() if count == most]
    verb = "leads" if len(names) == 1 else "each lead"
    why = (
        "no agent was evaluated on all of them"
        if averageable(settings)
        else "raw returns of different worlds have no common mean"
    )
    return f"{_listed(names)} {verb} {most} of {noun(settings)} ({why})."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def score_lines(run: RunResult) -> list[str]:
    """One line per task with a normalised score, and the references it stands on."""
    if "last" not in run.evaluations:
        return []
    lines = []
    for setting in settings_of([run]):
        found = estimates.estimate([run], setting)
        if found is not None and setting.reference is not None:
            score = format_score(found, setting.measure)
            lines.append(f"{setting.task}: normalised score {score}, of {setting.scale}")
    return lines


def verdict(pair: Pair) -> str:
    """One sentence on a pair: the difference, its interval, and whether it is clear."""
    difference = pair.result.difference
    points = round(100 * difference.value)
    relation = "its Transformer twin " if pair.twin else ""
    size = f"{abs(points)} point{'' if abs(points) == 1 else 's'}"
    where = f"{size} {'ahead of' if points > 0 else 'behind'}" if points else "level with"
    interval = (
        f"95 % interval of the difference {format_points(difference.low)} to "
        f"{format_points(difference.high)}, {format_p(pair.adjusted_p)}"
    )
    clear = pair.adjusted_p < 0.05
    ending = "" if clear else ", which these episodes cannot tell from chance"
    return f"{pair.first} is {where} {relation}{pair.second} ({interval}){ending}."
