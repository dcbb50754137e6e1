"""Numbers to statements: intervals, paired tests, tables, figures and the HTML report.

Works on plain results (:mod:`mail_agents.report.results`) and needs neither torch nor a simulator.
"""

from mail_agents.report.html import write_report
from mail_agents.report.plots import learning_curves, success_bars
from mail_agents.report.results import (
    RunResult,
    TaskResult,
    Video,
    group_by_task,
    load_results,
    save_results,
)
from mail_agents.report.summary import headline
from mail_agents.report.tables import pair_rows, score_rows, to_markdown, to_rich

__all__ = [
    "RunResult",
    "TaskResult",
    "Video",
    "group_by_task",
    "headline",
    "learning_curves",
    "load_results",
    "pair_rows",
    "save_results",
    "score_rows",
    "success_bars",
    "to_markdown",
    "to_rich",
    "write_report",
]
