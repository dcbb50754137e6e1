"""What works on this machine, what does not, why, and the command that repairs it.

Every import and the rendering test run in a process of their own: a broken binary may crash the
interpreter, and packages print and set variables when they are imported.
"""

import ctypes.util
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Lines that repair each optional package. The two kernels cannot be installed by an extra: they
# compile against the torch that is installed, which build isolation hides from them.
_EXTRA = "pip install 'mail-agents[{}]'"
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Package:
    """A package and how to get it.

    Attributes:
        module: Importable name.
        distribution: Name on the package index.
        gives: What works with it.
        fix: Command that installs it.
        core: Whether nothing works without it.
        run_import: Whether importing it is safe; one package asks a question when it is imported.
    """

    module: str
    distribution: str
    gives: str
    fix: str
    core: bool = False
    run_import: bool = True


_CORE = (
    ("numpy", "numpy"),
    ("torch", "torch"),
    ("gymnasium", "gymnasium"),
    ("safetensors", "safetensors"),
    ("h5py", "h5py"),
    ("scipy", "scipy"),
    ("diffusers", "diffusers"),
    ("matplotlib", "matplotlib"),
    ("imageio_ffmpeg", "imageio-ffmpeg"),
    ("tensorboard", "tensorboard"),
)
PACKAGES = (
    *(
        Package(m, d, "everything", f"pip install --force-reinstall --no-deps {d}", core=True)
        for m, d in _CORE
    ),
    Package("mujoco", "mujoco", "MuJoCo worlds", _EXTRA.format("sim")),
    Package("metaworld", "metaworld", "Meta-World worlds and experts", _EXTRA.format("sim")),
    Package(
        "gymnasium_robotics",
        "gymnasium-robotics",
        "Adroit, Franka Kitchen, mazes",
        _EXTRA.format("sim"),
    ),
    Package("robosuite", "robosuite", "robosuite worlds", _EXTRA.format("robosuite")),
    Package("minari", "minari", "Minari data sets, in and out", _EXTRA.format("minari")),
    Package("stable_baselines3", "stable-baselines3", "SB3 policies", _EXTRA.format("sb3")),
    Package(
        "libero",
        "hf-libero",
        "LIBERO worlds",
        _EXTRA.format("libero") + " && pip install --no-deps hf-libero==0.1.4",
        run_import=False,
    ),
)

# LIBERO's package has no meshes; its simulation is imported with those that are found.
_LIBERO = "from mail_envs.libero_setup import import_libero; import_libero()"
_MESHES_FIX = (
    "git clone --depth 1 https://github.com/Lifelong-Robot-Learning/LIBERO && "
    "export MAIL_AGENTS_LIBERO_ASSETS=$PWD/LIBERO/libero/libero/assets"
)

# One image of a sphere: fails where there is no OpenGL, which importing mujoco does not show.
_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(data)
    assert renderer.render().max() > 0, "the image is black"
"""
_GL_FIX = "apt-get install libegl1 libgl1 libgl1-mesa-dri libosmesa6 (Debian and Ubuntu)"


def run_doctor() -> dict[str, Any]:
    """Examines this machine.

    Returns:
        JSON-ready: ``ok`` (whether everything in the core works), ``python``, ``platform``,
        ``packages`` (rows with ``name``, ``version``, ``ok``, ``problem``, ``gives``, ``fix``,
        ``core``), ``torch``, ``rendering``, ``kernels`` and ``plugins``.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        rendering = pool.submit(_rendering)
        packages = list(pool.map(_examine, PACKAGES))
        packages += [_meshes() for row in packages if row["name"] == "hf-libero" and row["ok"]]
        rendered = rendering.result()
    torch_works = all(row["ok"] for row in packages if row["name"] == "torch")
    return {
        "ok": all(row["ok"] for row in packages if row["core"]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "torch": _torch() if torch_works else {},
        "rendering": rendered,
        "kernels": _kernels() if torch_works else [],
        "plugins": _plugins(),
    }


def _examine(package: Package) -> dict[str, Any]:
    try:
        version = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None:
        problem = "not installed"
    elif package.run_import:
        problem = _run(f"import {package.module}")
    else:
        problem = ""
    return {
        "name": package.distribution,
        "version": version,
        "ok": not problem,
        "problem": problem,
        "gives": package.gives,
        "fix": package.fix if problem else "",
        "core": package.core,
    }


def _meshes() -> dict[str, Any]:
    """Whether LIBERO's simulation finds all it needs, above all its meshes."""
    problem = _run(_LIBERO)
    return {
        "name": "LIBERO's meshes",
        "version": None,
        "ok": not problem,
        "problem": problem,
        "gives": "LIBERO worlds",
        "fix": _MESHES_FIX if problem else "",
        "core": False,
    }


def _run(code: str, **variables: str) -> str:
    """Runs Python code elsewhere; returns the last line of its error, or an empty string."""
    environment = {**os.environ, **variables}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"crashed with signal {-done.returncode}"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    # Interpreter exit may add "Exception ignored in ..." after the error that matters.
    errors = [line for line in lines if not line.startswith((" ", "Exception ignored"))]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]


def _rendering() -> dict[str, Any]:
    """Tries MuJoCo's ways to render without a display."""
    asked = os.environ.get("MUJOCO_GL", "")
    libraries = {name: bool(ctypes.util.find_library(name)) for name in ("EGL", "OSMesa")}
    attempts: dict[str, str] = {}
    for backend in [asked] if asked else ["egl", "osmesa"]:
        attempts[backend] = _run(_RENDER, MUJOCO_GL=backend)
        if not attempts[backend]:
            break
    working = [backend for backend, problem in attempts.items() if not problem]
    return {
        "MUJOCO_GL": asked or None,
        "libraries": libraries,
        "ok": bool(working),
        "backend": working[0] if working else None,
        "problems": {backend: problem for backend, problem in attempts.items() if problem},
        "fix": "" if working else _GL_FIX,
    }


def _torch() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "devices": devices,
        "nvcc": shutil.which("nvcc"),
        "nvidia_smi": shutil.which("nvidia-smi"),
        "threads": torch.get_num_threads(),
    }


def _kernels() -> list[dict[str, Any]]:
    from mail_agents.ops.backends import backend_report

    return backend_report()


def _plugins() -> dict[str, Any]:
    from mail_agents import registry

    ids = registry.list_agents()
    return {"agents": len(ids), "problems": registry.plugin_problems()}


def print_report(report: dict[str, Any], console: Console) -> None:
    """Prints what :func:`run_doctor` found, and every repair, for people."""
    torch, rendering = report["torch"], report["rendering"]
    console.print(f"python {report['python']} on {report['platform']}")
    if torch:
        console.print(escape(f"torch {torch['version']}: {_describe_cuda(torch)}"))
    table = Table(title="packages", title_justify="left")
    for column in ("package", "version", "gives", "state"):
        table.add_column(column, overflow="fold")
    for row in report["packages"]:
        state = "[green]works[/green]" if row["ok"] else f"[red]{escape(row['problem'])}[/red]"
        table.add_row(row["name"], row["version"] or "", row["gives"], state)
    console.print(table)
    _print_kernels(report["kernels"], console)
    if rendering["ok"]:
        console.print(f"rendering: works with MUJOCO_GL={rendering['backend']}")
    else:
        console.print("rendering: [red]does not work[/red]; worlds run without images")
        for backend, problem in rendering["problems"].items():
            console.print(escape(f"  {backend}: {problem}"))
    console.print(f"agents: {report['plugins']['agents']} registered")
    for name, problem in report["plugins"]["problems"].items():
        console.print(escape(f"  plugin {name} failed: {problem}"))
    repairs = _repairs(report)
    if repairs:
        console.print("\nto repair or add:")
        for what, fix in repairs.items():
            console.print(escape(f"  {what}:"))
            console.print(escape(f"    {fix}"), soft_wrap=True)
    console.print("\nthe core works" if report["ok"] else "\n[red]the core is broken[/red]")


def _print_kernels(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="kernels, in the order in which they are tried", title_justify="left")
    for column in ("operation", "backend", "'auto' takes it for", "state"):
        table.add_column(column, overflow="fold")
    for row in rows:
        reason = f"[yellow]{escape(row['reason'])}[/yellow]"
        state = "[green]works[/green]" if row["available"] else reason
        table.add_row(row["op"], row["name"], ", ".join(row["auto"]), state)
    console.print(table)
    forced = os.environ.get("MAIL_AGENTS_BACKEND")
    if forced:
        console.print(escape(f"MAIL_AGENTS_BACKEND={forced} is set: it replaces 'auto'"))
    for library in dict.fromkeys(row["versions"].get("library") for row in rows):
        if library:
            console.print(escape(f"native kernels: {library}"), soft_wrap=True)


def _repairs(report: dict[str, Any]) -> dict[str, str]:
    fixes: dict[str, list[str]] = {}
    for row in report["packages"]:
        if row["fix"]:
            fixes.setdefault(row["fix"], []).append(row["name"])
    for row in report["kernels"]:
        if row["fix"]:
            where = "GPU" if row["name"] == "cuda" else "CPU"
            fixes.setdefault(row["fix"], []).append(f"{row['op']} on a {where}")
    if report["rendering"]["fix"]:
        fixes.setdefault(report["rendering"]["fix"], []).append("rendering")
    return {", ".join(dict.fromkeys(names)): fix for fix, names in fixes.items()}


def _describe_cuda(torch: dict[str, Any]) -> str:
    if torch["cuda_available"]:
        return f"CUDA {torch['cuda_build']} on {', '.join(torch['devices'])}"
    if torch["cuda_build"] is None:
        hint = " although nvidia-smi is here: reinstall torch from its CUDA index"
        return "CPU build" + (hint if torch["nvidia_smi"] else "")
    return f"CUDA {torch['cuda_build']} build, but no usable GPU (driver too old, or none)"
