"""Artifacts and checkpoints: exact round trips, and everything that must be refused."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mail_agents
from mail_agents import checkpoint
from mail_agents.agents import mail
from mail_agents.checkpoint import (
    artifact_bytes,
    has_checkpoint,
    last_checkpoint,
    load_agent,
    load_checkpoint,
    read_info,
    restore_training_state,
    save_checkpoint,
    write_atomic,
)
from mail_agents.data.example import example_dataset, example_features
from mail_agents.errors import (
    CorruptFileError,
    InvalidInputError,
    MissingStatisticsError,
    StorageError,
    UnknownNameError,
)

GOLDEN = sorted((Path(__file__).parents[1] / "data").glob("artifact-v*"))
SMALL = {"mixer": "attention", "layers": 1, "heads": 2, "dropout": 0.2}
DATASET = example_dataset(example_features(), 12)


def small_agent(seed=0, **overrides):
    """Two transformer blocks with dropout, diffusion and an average: every kind of state."""
    settings = {
        "width": 8,
        "feature_width": 8,
        "history": 2,
        "horizon": 2,
        "diffusion_steps": 2,
        "encoder": SMALL,
        "decoder": SMALL,
        "optim": {"schedule": "cosine", "warmup_steps": 2, "grad_clip": 1.0, "batch_size": 4},
        **overrides,
    }
    agent = mail_agents.make(
        "mail/ed-tr-ddpm", DATASET.features, device="cpu", seed=seed, **settings
    )
    agent.fit_statistics(DATASET)
    return agent


def train(agent, first, last):
    windows = DATASET.windows(agent.window_spec)
    return [
        agent.update(windows[np.random.default_rng(step).integers(0, len(windows), 4)])["loss"]
        for step in range(first, last)
    ]


def act(agent, deterministic=False):
    agent.reset([0, 1], seed=[3, 4])
    rng = np.random.default_rng(0)
    return np.stack(
        [
            agent.act({"state": rng.standard_normal((2, 6))}, deterministic=deterministic)
            for _ in range(4)
        ]
    )


@pytest.fixture(scope="module")
def trained():
    agent = small_agent()
    agent.configure_optim(20)
    torch.manual_seed(0)
    train(agent, 0, 4)
    return agent


@pytest.fixture
def artifact(trained, tmp_path):
    return trained.save(tmp_path / "agent.safetensors")


def rewrite(path, edit):
    """Writes the artifact again after ``edit(tensors, info)``, as an outside tool would."""
    tensors = load_file(path)
    with _open(path) as file:
        info = json.loads(file.metadata()["mail_agents"])
    metadata = edit(tensors, info)
    metadata = {"mail_agents": json.dumps(info)} if metadata is None else metadata
    save_file(tensors, path, metadata=metadata)


def _open(path):
    import safetensors

    return safetensors.safe_open(path, framework="pt")


# ---- round trips -----------------------------------------------------------------------------


def test_an_artifact_is_enough_to_act(trained, artifact):
    loaded = mail_agents.load(artifact, device="cpu")
    assert loaded.agent_id == trained.agent_id
    assert (loaded.config, loaded.features, loaded.tasks) == (
        trained.config,
        trained.features,
        trained.tasks,
    )
    assert loaded.provenance["dataset"] == trained.provenance["dataset"]
    assert loaded.updates == 4
    np.testing.assert_array_equal(act(loaded), act(trained))
    assert artifact_bytes(loaded) == artifact_bytes(trained) == artifact.read_bytes()


def test_bytes_are_the_same_in_every_process(trained, artifact):
    # One metadata key: the order of several would change with the hash seed of the process.
    with _open(artifact) as file:
        assert list(file.metadata()) == ["mail_agents"]
        text = file.metadata()["mail_agents"]
    info = json.loads(text)
    assert text == json.dumps(info, sort_keys=True, separators=(",", ":"))
    assert info["format_version"] == 1
    groups = {key.partition("/")[0] for key in load_file(artifact)}
    assert groups == {"model", "ema", "norm"}


def test_raw_weights_act_without_the_average_and_can_be_saved_again(trained, artifact, tmp_path):
    raw = load_agent(artifact, device="cpu", weights="raw")
    assert raw.ema is None
    assert raw.acting_policy is raw.policy
    assert not np.array_equal(act(raw), act(trained))
    again = load_agent(raw.save(tmp_path / "raw.safetensors"), device="cpu")
    np.testing.assert_array_equal(act(again), act(raw))
    with pytest.raises(InvalidInputError, match="'ema' or 'raw'"):
        load_agent(artifact, weights="averaged")  # type: ignore[arg-type]


def test_a_seed_for_acting_can_be_chosen(artifact):
    runs = []
    for seed in (1, 1, 2):
        agent = load_agent(artifact, device="cpu", seed=seed)
        agent.reset()
        runs.append(agent.act({"state": np.zeros((1, 6))}, deterministic=False))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_info_is_read_without_tensors(trained, artifact):
    info = read_info(artifact)
    assert info["agent"] == "mail/ed-tr-ddpm"
    assert info["bytes"] == artifact.stat().st_size
    model = trained.policy.state_dict().values()
    assert info["parameters"] == sum(tensor.numel() for tensor in model)
    assert read_info(artifact.parent) == info  # a directory stands for the artifact in it


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
def test_golden_artifacts_of_every_format_load_and_act_as_they_did(folder):
    agent = load_agent(folder, device="cpu")
    stored = json.loads((folder / "actions.json").read_text())
    for deterministic in (True, False):
        agent.reset([0, 1], seed=[1, 2], task=["task-0", "task-1"])
        actions = [
            agent.act({"a": np.array(a), "b": np.array(b, np.float32)}, deterministic=deterministic)
            for a, b in zip(*stored["observations"].values(), strict=True)
        ]
        np.testing.assert_allclose(actions, stored["actions"][str(deterministic)], atol=1e-4)


def test_the_first_golden_artifact_is_from_before_stacks_had_heads():
    """So that what it lacks has to be filled in to act as it did."""
    (first,) = (path for path in GOLDEN if path.name == "artifact-v1")
    stacks = [read_info(first)["config"][part] for part in ("encoder", "decoder")]
    assert all("headdim" not in stack for stack in stacks)
    loaded = load_agent(first, device="cpu").config
    assert [loaded.encoder.headdim, loaded.decoder.headdim] == [64, 64]


def test_there_is_a_golden_artifact_for_the_current_format():
    assert f"artifact-v{checkpoint.FORMAT_VERSION}" in [path.name for path in GOLDEN]


def test_what_cannot_act_is_not_saved(tmp_path):
    unfitted = mail_agents.make("mail/d-ma-bc", example_features(), device="cpu")
    with pytest.raises(MissingStatisticsError):
        unfitted.save(tmp_path / "a.safetensors")
    broken = small_agent()
    with torch.no_grad():
        next(broken.policy.parameters()).fill_(torch.nan)
    with pytest.raises(InvalidInputError, match=r"not written: 'model/.*NaN.*grad_clip"):
        broken.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# ---- files that must be refused --------------------------------------------------------------


def test_every_truncation_is_refused(artifact):
    data = artifact.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        artifact.write_bytes(data[:size])
        with pytest.raises(CorruptFileError) as caught:
            load_agent(artifact, device="cpu")
        assert str(artifact) in str(caught.value)
    artifact.write_bytes(data + b"\0")
    with pytest.raises(CorruptFileError):
        load_agent(artifact, device="cpu")


def test_every_flipped_bit_is_refused(artifact):
    data = bytearray(artifact.read_bytes())
    header = struct.unpack("<Q", data[:8])[0]
    rng = np.random.default_rng(0)
    spots = [*rng.integers(8, 8 + header, 25), *rng.integers(8 + header, len(data), 25)]
    for spot in [0, 3, 7, 8, *map(int, spots)]:
        flipped = bytearray(data)
        flipped[spot] ^= 1 << int(rng.integers(0, 7))
        artifact.write_bytes(flipped)
        with pytest.raises((CorruptFileError, UnknownNameError)) as caught:
            load_agent(artifact, device="cpu")
        assert str(artifact) in str(caught.value), f"byte {spot}"


class Boom:
    """Runs code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("writer", ["pickle", "torch", "legacy torch", "zip", "text", "numpy"])
def test_foreign_files_are_refused_without_being_run(tmp_path, writer):
    path, mark = tmp_path / "agent.safetensors", tmp_path / "executed"
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"model": Boom(mark)}))
    elif writer == "torch":
        torch.save({"model": Boom(mark)}, path)
    elif writer == "legacy torch":
        torch.save({"model": Boom(mark)}, path, _use_new_zipfile_serialization=False)
    elif writer == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    elif writer == "text":
        path.write_text("not an agent, but long enough to look like a header")
    else:
        np.savez(path.with_suffix(".npz"), a=np.zeros(3))
        path.with_suffix(".npz").rename(path)
    for read in (load_agent, read_info):
        with pytest.raises(CorruptFileError) as caught:
            read(path)
        assert str(path) in str(caught.value)
    if writer in ("pickle", "torch", "zip"):
        assert "pickle" in str(caught.value)
    assert not mark.exists()


def first_key(prefix):
    return lambda tensors: next(key for key in sorted(tensors) if key.startswith(prefix))


def delete(prefix):
    def edit(tensors, info):
        del tensors[first_key(prefix)(tensors)]

    return edit


def poison(prefix, value):
    def edit(tensors, info):
        key = next(
            k for k in sorted(tensors) if k.startswith(prefix) and tensors[k].is_floating_point()
        )
        tensors[key].view(-1)[0] = value

    return edit


def reshape(tensors, info):
    key = first_key("model/")(tensors)
    tensors[key] = tensors[key].reshape(-1)[:-1].clone()


def retype(tensors, info):
    key = first_key("ema/")(tensors)
    tensors[key] = tensors[key].double()


def nudge(tensors, info):
    tensors[first_key("model/")(tensors)].view(-1)[0] += 1.0


def put(key, value):
    def edit(tensors, info):
        inner = info
        *path, last = key.split(".")
        for name in path:
            inner = inner[name]
        if value is None:
            del inner[last]
        else:
            inner[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (delete("model/"), CorruptFileError, ["missing tensors ['model/"]),
        (delete("norm/"), CorruptFileError, ["missing tensors ['norm/"]),
        (delete("ema/"), CorruptFileError, ["missing tensors ['ema/"]),
        (lambda t, i: t.update({"model/x": torch.ones(1)}), CorruptFileError, ["['model/x']"]),
        (lambda t, i: t.update({"other": torch.ones(1)}), CorruptFileError, ["['other']"]),
        (poison("model/", torch.nan), CorruptFileError, ["tensor 'model/", "NaN"]),
        (poison("norm/", torch.inf), CorruptFileError, ["tensor 'norm/", "infinity"]),
        (reshape, CorruptFileError, ["tensor 'model/", "expected torch.float32"]),
        (retype, CorruptFileError, ["tensor 'ema/", "torch.float64"]),
        (nudge, CorruptFileError, ["'sha256'", "altered"]),
        (put("config.width", 16), CorruptFileError, ["tensor 'model/", "from the stored config"]),
        (put("config.execute", 1), CorruptFileError, ["'sha256'", "altered"]),
        (put("config.widht", 16), CorruptFileError, ["'widht'", "Did you mean 'width'"]),
        (put("config.width", "wide"), CorruptFileError, ["width"]),
        (put("config.history", 0), CorruptFileError, ["history"]),
        (put("config", None), CorruptFileError, ["'config'"]),
        (put("features.action", None), CorruptFileError, ["action"]),
        (put("features.action.kind", "video"), CorruptFileError, ["'video'"]),
        (put("agent", "mail/unheard-of"), UnknownNameError, ["'mail/unheard-of'", "Install"]),
        (put("agent", None), CorruptFileError, ["'agent'"]),
        (
            put("agent", "antigravity:mail/ed-ma-bc"),
            CorruptFileError,
            ["'antigravity:", "plain id"],
        ),
        (put("tasks", "all"), CorruptFileError, ["'tasks'", "list"]),
        (put("updates", "4"), CorruptFileError, ["'updates'", "int"]),
        (put("sha256", None), CorruptFileError, ["'sha256'"]),
        (put("format_version", 2), CorruptFileError, ["version 2", "pip install --upgrade"]),
        (put("format_version", "x"), CorruptFileError, ["metadata"]),
        (lambda t, i: {"other": "key"}, CorruptFileError, ["'mail_agents' is missing"]),
        (lambda t, i: {"mail_agents": "{"}, CorruptFileError, ["unreadable"]),
        (lambda t, i: {"mail_agents": "[]"}, CorruptFileError, ["unreadable"]),
    ],
)
def test_altered_artifacts_are_refused_by_file_and_key(artifact, edit, error, words):
    rewrite(artifact, edit)
    with pytest.raises(error) as caught:
        load_agent(artifact, device="cpu")
    for word in [str(artifact), *words]:
        assert word in str(caught.value)


def test_missing_files_and_directories_without_an_artifact(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(CorruptFileError, match=r"does not exist.*checkpoints/step-"):
            load_agent(path)


# ---- atomic writes ---------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"file.*No space left.*Free some space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_reader_of_the_old_file_never_sees_half_of_the_new(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with path.open("rb") as reader:
        write_atomic(path, b"new and longer")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new and longer"


def test_writing_where_it_is_not_possible_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file/below"):
        write_atomic(tmp_path / "file" / "below", b"")


# ---- training checkpoints --------------------------------------------------------------------


def saved(run, step=4):
    agent = small_agent()
    agent.configure_optim(20)
    torch.manual_seed(0)
    train(agent, 0, step)
    save_checkpoint(run, step, agent, {"sampler": {"epoch": 1}, "seconds": 0.5})
    return agent


def test_resuming_is_exact_to_the_last_bit(tmp_path):
    original = saved(tmp_path)
    expected = train(original, 4, 9)
    torch.manual_seed(123)  # a resumed process starts anywhere
    agent, state = load_checkpoint(last_checkpoint(tmp_path), device="cpu")
    assert state["step"] == 4
    assert state["loop"] == {"sampler": {"epoch": 1}, "seconds": 0.5}
    agent.configure_optim(20)
    restore_training_state(agent, state["agent"])
    assert train(agent, 4, 9) == expected
    assert artifact_bytes(agent) == artifact_bytes(original)
    ours, theirs = (checkpoint.training_state(each) for each in (agent, original))
    assert _same(ours, theirs)


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@pytest.mark.parametrize(
    "part", ["optimizer", "scheduler", "generator", "torch_rng", "ema"], ids=str
)
def test_every_part_of_the_state_matters(tmp_path, part):
    """The test above can only mean something if leaving a part out shows."""
    original = saved(tmp_path)
    train(original, 4, 9)
    agent, state = load_checkpoint(last_checkpoint(tmp_path), device="cpu")
    agent.configure_optim(20)
    fresh = small_agent(seed=1)
    fresh.configure_optim(20)
    torch.manual_seed(99)
    other = checkpoint.training_state(fresh)
    restore_training_state(agent, {**state["agent"], part: other[part]})
    train(agent, 4, 9)
    assert artifact_bytes(agent) != artifact_bytes(original)


def test_state_of_a_kind_of_its_own_is_part_of_the_checkpoint(tmp_path, monkeypatch):
    class Lagging(mail.MailAgent):
        """Training depends on a copy of the weights as they were at the last odd update."""

        teacher: torch.Tensor | None = None

        def on_update(self):
            if self.updates % 2:
                self.teacher = torch.cat([p.detach().flatten() for p in self.policy.parameters()])

        def loss(self, batch):
            loss, metrics = super().loss(batch)
            scale = 1.0 if self.teacher is None else 1 + self.teacher.square().sum()
            return loss * scale, metrics

        def extra_training_state(self):
            return {"teacher": self.teacher}

        def load_extra_training_state(self, state):
            self.teacher = state.get("teacher")

    monkeypatch.setattr(mail, "MailAgent", Lagging)
    original = saved(tmp_path)
    assert isinstance(original, Lagging)
    expected = train(original, 4, 9)
    found = {}
    for name in ("whole", "as written before"):
        agent, state = load_checkpoint(last_checkpoint(tmp_path), device="cpu")
        agent.configure_optim(20)
        if name != "whole":
            del state["agent"]["extra"]
        restore_training_state(agent, state["agent"])
        found[name] = train(agent, 4, 9)
    assert found["whole"] == expected
    assert found["as written before"] != expected


def test_a_run_is_not_continued_on_another_kind_of_device(tmp_path):
    saved(tmp_path)
    agent, state = load_checkpoint(last_checkpoint(tmp_path), device="cpu")
    agent.configure_optim(20)
    with pytest.raises(InvalidInputError, match=r"trained on 'cuda'.*--device cuda"):
        restore_training_state(agent, {**state["agent"], "device": "cuda"})


def test_two_checkpoints_are_kept_and_last_names_the_newest(tmp_path):
    agent = small_agent()
    agent.configure_optim(20)
    assert not has_checkpoint(tmp_path)
    with pytest.raises(CorruptFileError, match=r"holds no complete checkpoint.*last"):
        last_checkpoint(tmp_path)
    root = tmp_path / "checkpoints"
    kept = []
    for step in (1, 2, 10, 3, 1):
        save_checkpoint(tmp_path, step, agent, {})
        assert last_checkpoint(tmp_path).name == f"step-{step:08d}"
        kept.append(sorted(int(path.name[5:]) for path in root.glob("step-*")))
    # Going back to an earlier step never deletes what was just written.
    assert kept == [[1], [1, 2], [2, 10], [3, 10], [1, 3, 10]]


def test_the_same_step_again_replaces_it(tmp_path):
    agent = saved(tmp_path)
    save_checkpoint(tmp_path, 4, agent, {"sampler": {"epoch": 2}})
    _, state = load_checkpoint(last_checkpoint(tmp_path), device="cpu")
    assert state["loop"] == {"sampler": {"epoch": 2}}


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    agent = saved(tmp_path)
    root = tmp_path / "checkpoints"
    (root / ".step-00000099.tmp").mkdir()
    (root / ".step-00000099.tmp" / "agent.safetensors").write_bytes(b"half")
    (root / ".last.123.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, 5, agent, {})
    names = sorted(path.name for path in root.iterdir())
    assert names == ["last", "step-00000004", "step-00000005"]


def test_saving_and_restoring_need_an_optimiser(tmp_path):
    with pytest.raises(InvalidInputError, match="configure_optim"):
        save_checkpoint(tmp_path, 0, small_agent(), {})
    assert not has_checkpoint(tmp_path)
    saved(tmp_path)
    agent, state = load_checkpoint(last_checkpoint(tmp_path), device="cpu")
    with pytest.raises(InvalidInputError, match="configure_optim"):
        restore_training_state(agent, state["agent"])


def test_a_diverged_run_does_not_replace_its_last_good_checkpoint(tmp_path):
    agent = saved(tmp_path)
    with torch.no_grad():
        next(agent.policy.parameters()).fill_(torch.inf)
    with pytest.raises(InvalidInputError, match="NaN or infinity"):
        save_checkpoint(tmp_path, 5, agent, {})
    assert load_checkpoint(last_checkpoint(tmp_path), device="cpu")[0].updates == 4


def full_disk(monkeypatch, fail_at):
    """Lets every write of a file fail from the ``fail_at``-th flush on."""
    flushes, real = iter(range(1000)), os.fsync

    def fsync(descriptor):
        if next(flushes) >= fail_at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("fail_at", range(9))
def test_a_full_disk_leaves_a_checkpoint_that_loads(tmp_path, monkeypatch, fail_at):
    agent = saved(tmp_path)
    train(agent, 4, 5)
    with monkeypatch.context() as patch:
        full_disk(patch, fail_at)
        try:
            save_checkpoint(tmp_path, 5, agent, {})
        except StorageError as error:
            assert "No space left" in str(error)  # noqa: PT017
            assert "unchanged" in str(error)  # noqa: PT017
        else:
            assert fail_at >= 7
    found, state = load_checkpoint(last_checkpoint(tmp_path), device="cpu")
    assert found.updates == state["step"] in (4, 5)
    assert save_checkpoint(tmp_path, 5, agent, {}).name == "step-00000005"


def test_a_full_disk_inside_the_state_file(tmp_path, monkeypatch):
    agent = saved(tmp_path)
    real = torch.save

    def save(state, file):
        real(state, file)
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(StorageError, match=r"train_state\.pt.*file write failed"):
        save_checkpoint(tmp_path, 5, agent, {})
    assert last_checkpoint(tmp_path).name == "step-00000004"


# ---- training states that must be refused ----------------------------------------------------


def test_a_training_state_cannot_run_code(tmp_path):
    saved(tmp_path)
    state, mark = last_checkpoint(tmp_path) / "train_state.pt", tmp_path / "executed"
    for content in ({"step": 4, "agent": Boom(mark), "loop": {}}, Boom(mark)):
        for modern in (True, False):
            torch.save(content, state, _use_new_zipfile_serialization=modern)
            with pytest.raises(CorruptFileError, match=r"train_state\.pt.*more than tensors"):
                load_checkpoint(state.parent, device="cpu")
    state.write_bytes(pickle.dumps(Boom(mark), protocol=2))
    with pytest.raises(CorruptFileError, match=r"train_state\.pt"):
        load_checkpoint(state.parent, device="cpu")
    assert not mark.exists()


def test_damaged_training_states(tmp_path):
    saved(tmp_path)
    path = last_checkpoint(tmp_path) / "train_state.pt"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    contents = [b"", data[:100], data[: len(data) // 2], data[:-1]]
    start = data.index(b"PK", 1000)
    for spot in rng.integers(start, len(data), 30):
        flipped = bytearray(data)
        flipped[int(spot)] ^= 1 << int(rng.integers(0, 8))
        contents.append(bytes(flipped))
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            _, state = load_checkpoint(path.parent, device="cpu")
        except CorruptFileError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "previous checkpoint" in str(error)  # noqa: PT017
            refused += 1
        else:  # the flip hit padding, or names that nothing reads: the content is whole
            expected = torch.load(_restored(path, data), weights_only=True)
            expected.pop("sha256")
            assert _same(state, expected)
    assert refused >= 4 + 15


def _restored(path, data):
    whole = path.with_name("whole.pt")
    whole.write_bytes(data)
    return whole


def test_files_of_two_steps_do_not_mix(tmp_path):
    agent = saved(tmp_path)
    train(agent, 4, 5)
    save_checkpoint(tmp_path, 5, agent, {})
    root = tmp_path / "checkpoints"
    shutil.copy(root / "step-00000004" / "train_state.pt", root / "step-00000005")
    with pytest.raises(CorruptFileError, match=r"has 5 updates, train_state.pt 4"):
        load_checkpoint(last_checkpoint(tmp_path), device="cpu")


@pytest.mark.parametrize("content", ["step-00000009\n", "", "../..", "\0"])
def test_a_pointer_to_nowhere_says_what_is_there(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "checkpoints" / "last").write_text(content)
    with pytest.raises(CorruptFileError, match=r"last.*step-00000004"):
        last_checkpoint(tmp_path)
