"""Alternatives are found, or said to be absent with the command; no stand-in stays behind."""

import sys
from types import ModuleType

import pytest

from mail_agents.benchmarks import alternatives


@pytest.fixture(autouse=True)
def forgotten():
    """Every test looks anew, and nobody sees what it found."""
    kinds = (alternatives.mambapy, alternatives.transformers, alternatives.official)
    for find in kinds:
        find.cache_clear()
    yield
    for find in kinds:
        find.cache_clear()


def without(monkeypatch, *blocked):
    real = alternatives.importlib.import_module

    def import_module(name):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(alternatives.importlib, "import_module", import_module)


def test_what_is_not_installed_is_listed_with_the_command(monkeypatch):
    without(monkeypatch, "mambapy", "transformers", "mamba_ssm", "selective_scan_cuda")
    found = [alternatives.mambapy(), alternatives.transformers(), alternatives.official()]
    assert alternatives.absences(*found) == [
        "mambapy: not installed: pip install 'mail-agents[benchmark]'",
        "transformers: not installed: pip install 'mail-agents[benchmark]'",
        f"mamba_ssm: not installed: {alternatives.OFFICIAL_COMMAND}",
    ]
    with pytest.raises(AttributeError):
        _ = found[0].pscan


def test_what_does_not_import_says_why(monkeypatch):
    def broken(name):
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(alternatives.importlib, "import_module", broken)
    absent = alternatives.mambapy().absent
    assert absent.startswith("mambapy: cannot be imported (RuntimeError: undefined symbol): pip")


class Package:
    """An importable mamba_ssm that needs its kernels, like the official one."""

    def __init__(self, monkeypatch, tmp_path, with_kernels):
        root = tmp_path / "mamba_ssm"
        for folder in ("ops", "modules"):
            (root / folder).mkdir(parents=True)
            (root / folder / "__init__.py").write_text("")
        (root / "__init__.py").write_text("import selective_scan_cuda\n")
        (root / "ops" / "selective_scan_interface.py").write_text("selective_scan_ref = 1\n")
        (root / "modules" / "mamba_simple.py").write_text("selective_state_update = 2\n")
        (root / "modules" / "ssd_minimal.py").write_text("ssd_minimal_discrete = 3\n")
        if with_kernels:
            (tmp_path / "selective_scan_cuda.py").write_text("")
        for name in [n for n in sys.modules if n.split(".")[0] == "mamba_ssm"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(tmp_path))
        # Which kernels transformers takes does not matter here.
        monkeypatch.setattr(alternatives, "transformers", lambda: None)


def test_a_package_without_kernels_is_used_and_leaves_no_trace(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    Package(monkeypatch, tmp_path, with_kernels=False)
    found = alternatives.official()
    assert found.absent == ""
    assert (found.scan.selective_scan_ref, found.ssd.ssd_minimal_discrete) == (1, 3)
    assert found.mamba.selective_state_update is None
    names = {name.split(".")[0] for name in sys.modules}
    assert names.isdisjoint({"mamba_ssm", "selective_scan_cuda"})


def test_a_package_that_fails_leaves_no_trace_either(monkeypatch, tmp_path):
    Package(monkeypatch, tmp_path, with_kernels=False)
    (tmp_path / "mamba_ssm" / "modules" / "ssd_minimal.py").write_text("import no_triton_here\n")
    assert "not installed" in alternatives.official().absent
    names = {name.split(".")[0] for name in sys.modules}
    assert names.isdisjoint({"mamba_ssm", "selective_scan_cuda"})


def test_a_package_with_kernels_is_left_alone(monkeypatch, tmp_path):
    Package(monkeypatch, tmp_path, with_kernels=True)
    monkeypatch.setattr(alternatives.torch.cuda, "is_available", lambda: True)
    found = alternatives.official()
    assert found.mamba.selective_state_update == 2
    assert {"mamba_ssm", "selective_scan_cuda"} <= set(sys.modules)
    for name in [n for n in sys.modules if n.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")]:
        del sys.modules[name]


def test_transformers_with_kernels_has_no_slow_path(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    assert "not its slow path" in alternatives.transformers().absent
