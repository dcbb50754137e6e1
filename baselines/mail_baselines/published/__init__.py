"""Published scores of offline-RL agents on D4RL, to be shown apart from our own.

Every file holds one table as its authors printed it, with the checkpoint, seeds and data behind it.
They are not a target: protocols differ, and some papers report the best evaluation of a run.
"""

import json
from importlib import resources

from mail_agents.report.published import PublishedTable

#: In the order in which reports show them.
_TABLES = (
    *("decision_transformer", "corl_last", "corl_best", "decision_mamba_ota"),
    *("decision_mamba", "iql"),
)


def load_published() -> list[PublishedTable]:
    """Reads all tables of this package."""
    folder = resources.files("mail_baselines.published")
    tables = []
    for name in _TABLES:
        document = json.loads(folder.joinpath(f"{name}.json").read_text("utf-8"))
        scores = {
            agent: {dataset: (score[0], score[1]) for dataset, score in column.items()}
            for agent, column in document.pop("scores").items()
        }
        tables.append(PublishedTable(**document, scores=scores))
    return tables
