"""Numbers to statements: intervals, paired tests, tables, figures and the HTML report.

Works on plain results (:mod:`mail_agents.report.results`) and needs neither torch nor a simulator.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mail_agents.data.references import Reference
    from mail_agents.report.html import write_report
    from mail_agents.report.plots import learning_curves, performance_profiles, success_bars
    from mail_agents.report.published import PublishedTable
    from mail_agents.report.results import (
        RunResult,
        TaskResult,
        Video,
        group_by_task,
        load_results,
        save_results,
    )
    from mail_agents.report.scores import normalised_score
    from mail_agents.report.summary import headline
    from mail_agents.report.tables import (
        overview_rows,
        pair_rows,
        score_rows,
        target_rows,
        to_markdown,
        to_rich,
    )

# Loaded at first use: a train script needs the results, but not matplotlib.
_LAZY = {
    "html": ("write_report",),
    "plots": ("learning_curves", "performance_profiles", "success_bars"),
    "published": ("PublishedTable",),
    "results": (
        *("RunResult", "TaskResult", "Video", "group_by_task", "load_results", "save_results"),
    ),
    "scores": ("Reference", "normalised_score"),
    "summary": ("headline",),
    "tables": (
        *("overview_rows", "pair_rows", "score_rows", "target_rows", "to_markdown", "to_rich"),
    ),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "PublishedTable",
    "Reference",
    "RunResult",
    "TaskResult",
    "Video",
    "group_by_task",
    "headline",
    "learning_curves",
    "load_results",
    "normalised_score",
    "overview_rows",
    "pair_rows",
    "performance_profiles",
    "save_results",
    "score_rows",
    "success_bars",
    "target_rows",
    "to_markdown",
    "to_rich",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
