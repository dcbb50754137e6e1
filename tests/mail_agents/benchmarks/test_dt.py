"""The benchmark against CORL times equal models on equal data, and says when the file is another.

CORL's own file is not here: a stand-in has its interface and its number of parameters.
"""

import sys

import numpy as np
import pytest

from mail_agents.benchmarks import dt
from mail_agents.benchmarks.arguments import Dt
from mail_agents.errors import InvalidInputError, MailAgentsError

STAND_IN = '''
from dataclasses import dataclass

import d4rl
import gym
import numpy as np
import pyrallis
import torch
import wandb
from torch import nn


@dataclass
class TrainConfig:
    seq_len: int = 20
    episode_len: int = 1000
    reward_scale: float = 0.001
    embedding_dim: int = 8
    num_layers: int = 1
    num_heads: int = 1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.1
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    clip_grad: float = 0.25


class SequenceDataset(torch.utils.data.IterableDataset):
    """Windows of the first trajectory; the last three steps of each are padding."""

    arrays = None

    def __init__(self, env_name, seq_len=10, reward_scale=1.0):
        arrays = gym.make(env_name).get_dataset()
        type(self).arrays = arrays
        end = int(np.argmax(arrays["terminals"] | arrays["timeouts"])) + 1
        self.states, self.actions = arrays["observations"][:end], arrays["actions"][:end]
        self.returns = reward_scale * np.cumsum(arrays["rewards"][:end][::-1])[::-1]
        self.length = seq_len

    def __iter__(self):
        while True:
            part = slice(0, self.length)
            mask = np.arange(self.length) < self.length - 3
            steps = np.arange(self.length)
            returns = self.returns[part].copy()
            yield self.states[part], self.actions[part], returns, steps, mask.astype(float)


class DecisionTransformer(nn.Module):
    made, masks = [], []

    def __init__(self, state_dim, action_dim, seq_len, episode_len, embedding_dim, **settings):
        super().__init__()
        self.made.append(self)
        self.times = nn.Embedding(episode_len + seq_len, embedding_dim)
        self.states = nn.Linear(state_dim, embedding_dim)
        self.head = nn.Linear(embedding_dim, action_dim)
        size = sum(p.numel() for p in self.parameters())
        self.rest = nn.Parameter(torch.zeros({size} - size))

    def forward(self, states, actions, returns_to_go, time_steps, padding_mask=None):
        self.masks.append(padding_mask)
        return self.head(self.states(states) + self.times(time_steps))


@pyrallis.wrap()
def train(config: TrainConfig):
    wandb.init()
'''

SMALL = {"episodes": 1, "batch_size": 2, "updates": 1, "rounds": 1}


@pytest.fixture
def corl(tmp_path):
    """Writes the stand-in; 728,579 is the size of CORL's model in Hopper."""

    def write(size=728_579):
        path = tmp_path / "dt.py"
        path.write_text(STAND_IN.replace("{size}", str(size)))
        return path

    return write


def test_it_times_both_on_the_same_trajectories(corl):
    before = set(sys.modules)
    report = dt.run(Dt(corl=corl(), **SMALL))
    seconds = report.figures["seconds"]
    assert list(seconds) == ["dt-corl, ours", "CORL's dt.py"]
    assert all(len(times) == 1 and times[0] > 0 for times in seconds.values())
    (table,) = report.tables
    assert [row[0] for row in table.rows] == list(seconds)
    assert table.rows[0][-1] == "1.00"
    assert "728,579 parameters each" in report.notes[0]
    # What stood in for the simulator and logging packages is gone again.
    assert not {"d4rl", "gym", "pyrallis", "wandb"} & (set(sys.modules) - before)


def test_the_other_code_gets_the_data_and_hidden_padding(corl):
    module = dt.load_corl(corl())
    dataset = dt.make_dataset(2)
    update, size = dt.corl_update(module, dataset, Dt(corl=corl(), **SMALL))
    update()
    assert size == 728_579
    arrays = module.SequenceDataset.arrays
    second = dataset.episode(1).observations["state"][:-1]
    assert [arrays[name].shape for name in ("observations", "actions")] == [(2000, 11), (2000, 3)]
    np.testing.assert_array_equal(arrays["observations"][1000:], second)
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [999, 1999]
    assert not arrays["terminals"].any()
    (mask,) = module.DecisionTransformer.masks  # True hides a step
    assert mask.tolist() == [[False] * 17 + [True] * 3] * 2


def test_both_learn(corl, monkeypatch):
    made, make = [], dt.mail_agents.make
    monkeypatch.setattr(
        dt.mail_agents, "make", lambda *a, **k: made.append(make(*a, **k)) or made[-1]
    )
    dataset, arguments = dt.make_dataset(1), Dt(corl=corl(), **SMALL)
    ours, _ = dt.our_update(dataset, arguments)
    module = dt.load_corl(corl())
    theirs, _ = dt.corl_update(module, dataset, arguments)
    for update, model in ((ours, made[0].policy), (theirs, module.DecisionTransformer.made[0])):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        update()
        assert any(not value.equal(before[name]) for name, value in model.state_dict().items())


def test_unequal_models_are_refused(corl):
    with pytest.raises(MailAgentsError, match="728579 parameters against 728580: an unfair"):
        dt.run(Dt(corl=corl(728_580), **SMALL))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match=r"nowhere\.py does not exist; download"):
        dt.load_corl(tmp_path / "nowhere.py")
    other = tmp_path / "other.py"
    other.write_text("import gym\n")
    with pytest.raises(InvalidInputError, match=r"other\.py is not CORL's"):
        dt.load_corl(other)
    page = tmp_path / "page.py"
    page.write_text("<!DOCTYPE html>\n")
    with pytest.raises(InvalidInputError, match=r"page\.py cannot be imported: invalid syntax"):
        dt.load_corl(page)
