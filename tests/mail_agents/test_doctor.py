"""What the doctor says about LIBERO, whose package is of no use without its meshes."""

import pytest

from mail_agents import doctor


@pytest.fixture(autouse=True)
def libero_alone(monkeypatch):
    """Pretends that LIBERO is installed and examines nothing else."""
    package = next(row for row in doctor.PACKAGES if row.distribution == "hf-libero")
    monkeypatch.setattr(doctor, "PACKAGES", (package,))
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.1.4")
    monkeypatch.setattr(doctor, "_RENDER", "")


def rows(monkeypatch, code):
    monkeypatch.setattr(doctor, "_LIBERO", code)
    return {row["name"]: row for row in doctor.run_doctor()["packages"]}


def test_missing_meshes_come_with_the_download(monkeypatch):
    found = rows(monkeypatch, "raise ImportError('no meshes')")
    assert found["hf-libero"]["ok"]
    row = found["LIBERO's meshes"]
    assert (row["ok"], row["problem"]) == (False, "ImportError: no meshes")
    assert "git clone" in row["fix"]
    assert "MAIL_AGENTS_LIBERO_ASSETS" in row["fix"]
    assert not row["core"]


def test_meshes_that_work(monkeypatch):
    row = rows(monkeypatch, "")["LIBERO's meshes"]
    assert (row["ok"], row["fix"]) == (True, "")


def test_without_the_package_meshes_are_not_asked_for(monkeypatch):
    def missing(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", missing)
    found = rows(monkeypatch, "raise SystemError")
    assert list(found) == ["hf-libero"]
    for line in ("pip install 'mail-agents[libero]'", "pip install --no-deps hf-libero==0.1.4"):
        assert line in found["hf-libero"]["fix"]


def test_the_doctor_and_the_worlds_give_the_same_commands():
    from mail_envs.libero_setup import DOWNLOADS, INSTALL

    (package,) = doctor.PACKAGES
    assert package.fix == " && ".join(INSTALL)
    assert DOWNLOADS[0] == doctor._MESHES_FIX
    assert "import_libero" in doctor._LIBERO
