"""What the numbers say, in words and pairs: shared by the tables, the figures and the HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass

from mail_agents.report import stats
from mail_agents.report.results import RunResult, agents_of, task_names
from mail_agents.report.stats import Estimate, PairedResult

# Okabe and Ito's colour-blind safe palette, without yellow (unreadable on white), in the order in
# which agents appear. An agent that does not learn is grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#C28A00", "#56B4E9", "#882255", "#44AA99")
#: The same hues, lighter, for a dark page.
PALETTE_DARK = (
    "#5AB0EA", "#FF8F4D", "#2FCB9E", "#DE86CD", "#EFC04A", "#9AD4F7", "#D9709F", "#7FD6CB",
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


def format_score(estimate: Estimate, success: bool, *, interval: bool = True) -> str:
    """Writes ``97 % [89, 99]`` for a success rate and ``312.4 [290.1, 330.0]`` for a return."""
    if success:
        text = f"{100 * estimate.value:.0f} %"
        bounds = f" [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"
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
    """Labels with their score over all tasks, best first."""
    scores = {
        label: stats.summarise(runs, which=which) for label, runs in agents_of(results).items()
    }
    return sorted(scores.items(), key=lambda item: -item[1].value)


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
    best = ranking(learned, which)[0][0]
    others = [label for label in groups if label != best]
    seen = {frozenset(pair[:2]) for pair in chosen}
    chosen += [(best, other, False) for other in others if frozenset((best, other)) not in seen]
    compared: list[tuple[str, str, bool, PairedResult]] = []
    for first, second, twin in chosen:
        if _episodes(groups[first], which) & _episodes(groups[second], which):
            result = stats.compare_paired(groups[first], groups[second], which)
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
    groups = agents_of(results)
    order = ranking(results, which)
    best, score = order[0]
    tied = [label for label, other in order if other.value == score.value]
    names = best if len(tied) == 1 else " and ".join([", ".join(tied[:-1]), tied[-1]])
    n_tasks = len(task_names(results, which))
    tasks = "1 task" if n_tasks == 1 else f"{n_tasks} tasks"
    if is_success(results, which):
        solved, n = stats.counts(groups[best], which=which)
        verb = "solves" if len(tied) == 1 else "each solve"
        text = (
            f"{names} {verb} {solved} of {n} unseen episodes on {tasks} "
            f"({100 * score.value:.0f} %, 95 % interval {100 * score.low:.0f} to "
            f"{100 * score.high:.0f} %)"
        )
    else:
        verb = "reaches" if len(tied) == 1 else "each reach"
        text = (
            f"{names} {verb} a mean return of {score.value:.1f} on {tasks} "
            f"(95 % interval {score.low:.1f} to {score.high:.1f})"
        )
    others = len(order) - len(tied)
    text += ", the most of the " + f"{len(order)} agents." if others else "."
    twins = [pair for pair in pairs(results, which) if pair.twin]
    return " ".join([text, *(verdict(pair) for pair in twins)])


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
