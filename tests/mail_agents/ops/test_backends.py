"""Backends are chosen in order, by name or not at all, and never silently."""

import importlib
import logging
import subprocess
import sys

import pytest
import torch

from mail_agents.errors import InvalidInputError, MissingDependencyError, UnknownNameError
from mail_agents.ops import backends, causal_conv1d, selective_scan, use_backend
from mail_agents.ops.backends import (
    Candidate,
    backend_report,
    choose,
    recording_backends,
    requested_backend,
)


@pytest.fixture(autouse=True)
def forget_choices(monkeypatch):
    """Probes and log lines happen once per process; every test starts without them."""
    backends.probe.cache_clear()
    monkeypatch.setattr(backends, "_logged", set())
    yield
    backends.probe.cache_clear()


def scan(backend="auto"):
    x, s = torch.zeros(1, 2, 8), torch.zeros(1, 2, 3)
    return selective_scan(x, x, -torch.ones(8, 3), s, s, backend=backend)


def conv(backend="auto"):
    return causal_conv1d(torch.zeros(1, 2, 8), torch.zeros(8, 4), backend=backend)


def taken_by_auto(op="selective_scan"):
    """The backend for CPU tensors; it depends on whether there is a compiler here."""
    (row,) = [row for row in backend_report() if row["op"] == op and "cpu" in row["auto"]]
    return row["name"]


def fail_import(monkeypatch, name, error):
    """Makes the import of one module raise, as a mismatched binary does."""
    real = importlib.import_module

    def broken(module, *args):
        if module == name:
            raise error
        return real(module, *args)

    monkeypatch.setattr(importlib, "import_module", broken)


@pytest.mark.parametrize(
    ("op", "module", "fix"),
    [
        (scan, "selective_scan_cuda", "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-deps"),
        (conv, "causal_conv1d", "pip install --no-deps --no-build-isolation causal-conv1d==1.7.0"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        ImportError("no such module"),
        AttributeError("module has no attribute 'load'"),
        OSError("undefined symbol: _ZN3c10"),
        RuntimeError("no kernel image"),
    ],
)
def test_a_broken_extension_is_explained_by_name_and_skipped_by_auto(
    op, module, fix, error, monkeypatch
):
    fail_import(monkeypatch, module, error)
    op()
    with pytest.raises(MissingDependencyError) as caught:
        op("cuda")
    message = str(caught.value)
    for part in (module, type(error).__name__, str(error), fix, "mail-agents doctor"):
        assert part in message


def test_unknown_names_are_explained_with_their_source(monkeypatch):
    with pytest.raises(UnknownNameError, match="Did you mean 'reference'") as caught:
        scan("referense")
    assert "argument" in str(caught.value)
    monkeypatch.setenv("MAIL_AGENTS_BACKEND", "cudaa")
    with pytest.raises(UnknownNameError, match="environment variable MAIL_AGENTS_BACKEND"):
        scan()
    with pytest.raises(UnknownNameError, match="use_backend"), use_backend("fast"):
        pass


def test_argument_beats_context_beats_environment(monkeypatch):
    assert requested_backend() == "auto"
    monkeypatch.setenv("MAIL_AGENTS_BACKEND", "torch")
    assert requested_backend() == "torch"
    with use_backend("reference"):
        assert requested_backend() == "reference"
        assert requested_backend("cuda") == "cuda"
        with use_backend("auto"):
            assert requested_backend() == "auto"
        assert requested_backend() == "reference"
    assert requested_backend() == "torch"


def test_context_is_left_after_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        _ = 1 / 0
    assert requested_backend() == "auto"


def test_environment_that_cannot_be_met_is_an_error(monkeypatch):
    monkeypatch.setenv("MAIL_AGENTS_BACKEND", "cuda")
    fail_import(monkeypatch, "selective_scan_cuda", ImportError("absent"))
    with pytest.raises(MissingDependencyError):
        scan()


def test_first_candidate_that_does_not_refuse_runs():
    def table(*reasons):
        named = zip(("cuda", "torch", "reference"), reasons, strict=True)
        return [Candidate(n, lambda: None, lambda _, r=r: r) for n, r in named]

    assert choose("op", table("no", None, None), "auto", 1).name == "torch"
    assert choose("op", table(None, None, None), "auto", 1).name == "cuda"
    assert choose("op", table("no", "no", None), "auto", 1).name == "reference"
    with pytest.raises(InvalidInputError, match="cannot run it: no"):
        choose("op", table("no", None, None), "cuda", 1)
    with pytest.raises(InvalidInputError, match="has no 'cuda' backend"):
        choose("op", table("no", None, None)[1:], "cuda", 1)


def test_the_choice_is_logged_once_with_reasons(caplog):
    with caplog.at_level(logging.INFO, logger="mail_agents.ops.backends"):
        scan()
        scan()
        scan("reference")
    lines = [r.getMessage() for r in caplog.records if r.name == "mail_agents.ops.backends"]
    assert len(lines) == 2
    assert lines[0].startswith(f"selective_scan runs on backend {taken_by_auto()!r}")
    assert "cuda: its kernels need tensors on a CUDA device" in lines[0]
    assert "'reference' (requested by name)" in lines[1]


def test_report_has_a_row_per_op_and_backend(monkeypatch):
    fail_import(monkeypatch, "selective_scan_cuda", AttributeError("broken"))
    rows = {(row["op"], row["name"]): row for row in backend_report()}
    for op in ("selective_scan", "causal_conv1d"):
        names = [name for of, name in rows if of == op]
        assert names == [name for name in backends.BACKENDS if name in names]
        assert {"cuda", "native", "torch", "reference"} <= set(names)
        takers = [name for name in names if "cpu" in rows[op, name]["auto"]]
        assert takers == [next(n for n in names if n != "cuda" and rows[op, n]["available"])]
    row = rows["selective_scan", "cuda"]
    assert row["available"] is False
    assert "AttributeError: broken" in row["reason"]
    assert row["fix"].endswith("mamba-ssm==2.3.2.post1")
    assert row["versions"]["torch"] == torch.__version__
    for name in ("torch", "reference"):
        assert rows["causal_conv1d", name]["available"] is True
        assert rows["causal_conv1d", name]["fix"] == ""


def test_auto_never_tries_the_extension_for_cpu_tensors(monkeypatch):
    def forbidden(name, *_):
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr(importlib, "import_module", forbidden)
    scan()
    conv()


def test_importing_the_package_imports_no_extension():
    code = (
        "import sys, mail_agents.mixers, mail_agents.ops;"
        "bad = {'mamba_ssm', 'selective_scan_cuda', 'causal_conv1d', 'causal_conv1d_cuda'};"
        "print(sorted(bad & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_backends_that_run_are_recorded_where_asked():
    scan()
    outer, inner = {}, {}
    with recording_backends(outer):
        conv("reference")
        with recording_backends(inner):
            scan("reference")
        scan()
    scan("reference")
    assert outer == {"causal_conv1d": {"reference"}, "selective_scan": {taken_by_auto()}}
    assert inner == {"selective_scan": {"reference"}}
