"""Every code block of the README and of docs/ runs, or says why it does not.

Blocks behind ``<!-- needs: libero -->`` or ``robosuite`` run where those are.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!--\s*not run: (\S[^>]*?)\s*-->\s*\Z")
NEEDS = re.compile(r"<!--\s*needs: (\w+)\s*-->\s*\Z")
#: What a block may need, and the fixture that provides it or skips with the reason.
PROVIDERS = {"libero": "libero_assets", "robosuite": "installed_robosuite"}


@dataclass(frozen=True)
class Block:
    """A fenced block; ``skipped`` says why it does not run, ``needs`` what it runs with."""

    language: str
    code: str
    line: int
    skipped: str
    needs: str


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        reason, needs = (
            marker[1] if (marker := pattern.search(before)) else "" for pattern in (NOT_RUN, NEEDS)
        )
        found.append(Block(match[1], match[2], before.count("\n") + 1, reason, needs))
    return found


def runnable(text: str) -> list[Block]:
    return [b for b in blocks_of(text) if b.language in ("python", "bash") and not b.skipped]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder in which `python scripts/...` and `mail-agents` work as in a checkout."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "constraints.txt").symlink_to(ROOT / "constraints.txt")
    tools = tmp_path / ".tools"
    tools.mkdir()
    for name, arguments in {"python": "", "mail-agents": "-m mail_agents.cli "}.items():
        launcher = tools / name
        launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        launcher.chmod(0o755)
    roots = [str(ROOT / folder) for folder in (".", "envs", "wrappers", "baselines")]
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(roots))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def installed_robosuite() -> None:
    if importlib.util.find_spec("robosuite") is None:
        pytest.skip("robosuite is not installed (docs/install.md)")


def run_page(page: Path, blocks: list[Block]) -> None:
    """Runs the blocks of one page in order; Python blocks share their names."""
    names: dict = {"__name__": "__main__"}
    for block in blocks:
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            # Padding makes the line numbers of a traceback those of the page.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{where}\n{block.code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in PAGES
        if runnable(page.read_text(encoding="utf-8"))
    ],
)
def test_code_blocks_run(page, place, request):
    blocks = runnable(page.read_text(encoding="utf-8"))
    lacking = {}
    for need in {block.needs for block in blocks} - {""}:
        try:
            request.getfixturevalue(PROVIDERS[need])
        except pytest.skip.Exception as reason:
            lacking[need] = str(reason)
    run_page(page, [block for block in blocks if block.needs not in lacking])
    if lacking:
        pytest.skip(f"the other blocks ran: {'; '.join(lacking.values())}")


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_markers_stand_before_a_block(page):
    text = page.read_text(encoding="utf-8")
    marked = [block for block in blocks_of(text) if block.skipped or block.needs]
    markers = text.count("<!-- not run") + text.count("<!-- needs")
    assert len(marked) == markers, "a marker without a block, or two before one"
    assert all(block.language in ("python", "bash") for block in marked)
    assert all(block.needs in ("", *PROVIDERS) for block in marked)


def test_blocks_are_found_and_can_fail(place):
    page = (
        "```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n```bash\nfalse\n```\n"
        "```text\nnot code\n```\n```bash\nmail-agents list >/dev/null\n```\n"
        "```python\nassert x == 2\n```\n"
    )
    found = runnable(page)
    assert [(block.language, block.line) for block in found] == [
        ("python", 1), ("bash", 12), ("python", 15),
    ]  # fmt: skip
    assert runnable("<!-- needs: libero -->\n" + page)[0].needs == "libero"
    run_page(Path("page.md"), found[:2])
    with pytest.raises(AssertionError):
        run_page(Path("page.md"), found)
    with pytest.raises(AssertionError, match="false"):
        run_page(Path("page.md"), blocks_of(page)[1:2])


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_no_placeholder_is_left(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^[A-Z]+_[A-Z_]+$", text, re.MULTILINE) == []


def test_every_command_names_a_script_that_exists():
    for page in PAGES:
        for script in re.findall(r"scripts/(\w+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / "scripts" / script).exists(), f"{page.relative_to(ROOT)}: {script}"


@pytest.mark.slow
def test_site_builds(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (extra 'docs')")
    for name in ("mail_agents", "envs", "wrappers", "baselines", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", "site"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "report" / "index.html").read_text(encoding="utf-8")
    assert "wilson_interval" in page
