"""Who may import whom, what importing costs, and that nothing we read can execute code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "mail_agents": ROOT / "mail_agents",
    "mail_envs": ROOT / "envs" / "mail_envs",
    "mail_wrappers": ROOT / "wrappers" / "mail_wrappers",
    "mail_baselines": ROOT / "baselines" / "mail_baselines",
}
# What data is made of, errors, and how processes are started; nothing that acts or learns.
SCHEMA = (
    *("mail_agents.data", "mail_agents.errors", "mail_agents.features", "mail_agents.seeding"),
    "mail_agents.interrupts",
)
MAY_IMPORT = {
    "mail_agents": ("mail_agents",),
    "mail_wrappers": ("mail_wrappers", *SCHEMA),
    "mail_envs": ("mail_envs", "mail_wrappers", *SCHEMA),
    "mail_baselines": ("mail_baselines", "mail_agents"),
}
FILES = [
    pytest.param(package, path, id=str(path.relative_to(ROOT)))
    for package, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
]


def imported_modules(tree: ast.AST, own: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Every module a file imports, at the top or inside functions, by statement or by string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(own[: len(own) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # "from mail_agents import data" imports mail_agents.data.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if name in ("import_module", "require", "__import__") and isinstance(
                first, ast.Constant
            ):
                yield node.lineno, str(first.value)


def forbidden(package: str, source: str, path: Path) -> list[str]:
    own = (package, *path.relative_to(FOLDERS[package]).with_suffix("").parts)
    found = []
    for line, module in imported_modules(ast.parse(source), own):
        ours = module.split(".")[0] in FOLDERS
        allowed = any(f"{module}.".startswith(f"{root}.") for root in MAY_IMPORT[package])
        if ours and not allowed:
            found.append(f"line {line}: {package} must not import {module}")
    return found


@pytest.mark.parametrize(("package", "path"), FILES)
def test_import_directions(package, path):
    assert forbidden(package, path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("package", "source", "count"),
    [
        ("mail_agents", "def f():\n    import mail_wrappers.datasets", 1),
        ("mail_agents", "import importlib\nimportlib.import_module('mail_envs')", 1),
        ("mail_wrappers", "from mail_agents.agent import Agent", 1),
        ("mail_wrappers", "from mail_agents import make", 1),
        ("mail_wrappers", "from mail_agents.data.episode import Episode\nimport numpy", 0),
        ("mail_envs", "from mail_wrappers import RecordEpisodes", 0),
        ("mail_envs", "from . import catalogue", 0),
        ("mail_baselines", "import mail_envs", 1),
    ],
)
def test_the_direction_test_can_fail(package, source, count):
    assert len(forbidden(package, source, FOLDERS[package] / "example.py")) == count


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe_calls(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or ""] + [alias.name for alias in node.names]
            found += [
                f"line {node.lineno}: imports {n}" for n in names if n.split(".")[0] in PICKLES
            ]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if call == "torch.load" and options.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if call == "np.load" and options.get("allow_pickle") != "False":
            found.append(f"line {node.lineno}: np.load without allow_pickle=False")
        if call in ("eval", "exec", "yaml.load", "yaml.unsafe_load"):
            found.append(f"line {node.lineno}: {call}")
    return found


@pytest.mark.parametrize(("package", "path"), FILES)
def test_nothing_we_read_can_execute_code(package, path):
    assert unsafe_calls(path.read_text(encoding="utf-8")) == []


def test_the_safety_test_can_fail():
    assert len(unsafe_calls("import pickle\ntorch.load(f)\nnp.load(f)\neval(x)")) == 4
    assert unsafe_calls("torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)") == []


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "{'torch', 'scipy', 'matplotlib', 'diffusers', 'h5py', 'mujoco'}"


@pytest.mark.parametrize(
    "code",
    [
        "import mail_agents",
        "import mail_agents; mail_agents.list_agents(); mail_agents.spec('mail/ed-ma-bc')",
        "import mail_agents.cli",
    ],
)
def test_names_are_cheap(code):
    loaded = run(f"import sys; {code}; print(sorted({HEAVY} & set(sys.modules)))")
    assert loaded == "[]"


def test_import_takes_less_than_400_ms():
    code = (
        "import time; t = time.perf_counter(); import mail_agents; print(time.perf_counter() - t)"
    )
    run(code)  # compiles
    assert min(float(run(code)) for _ in range(5)) < 0.4
