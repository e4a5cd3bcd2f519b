"""What this environment can and cannot do, and what to install for what is missing."""

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path

import psutil

from compress import __version__
from compress.cost import latency_table
from compress.cost.energy import Rapl
from compress.ir import Document
from compress.measure import timing
from compress.measure.verify_on_device import Nvml

DISTRIBUTION = "compress-compiler"
LEAST_PYTHON = (3, 11)
LEAST_MEMORY_GB = 4.0
LEAST_DISK_GB = 2.0


class Check(Document):
    """One thing that was looked at; a `required` one that is not `ok` stops every compilation."""

    name: str
    found: str
    ok: bool = True
    required: bool = False
    remedy: str | None = None


def examine() -> dict[str, object]:
    """All checks, and whether a compilation can run here at all."""
    checks = [check() for check in CHECKS]
    return {
        "ready": all(check.ok for check in checks if check.required),
        "compress": __version__,
        "checks": [check.model_dump(mode="json") for check in checks],
        "environment": timing.environment(),
    }


def text(found: dict[str, object]) -> str:
    """The checks for people: what is there, and below each gap how to close it."""
    lines = []
    checks = found["checks"]
    assert isinstance(checks, list)
    for check in checks:
        mark = "ok" if check["ok"] else "MISSING" if check["required"] else "note"
        lines.append(f"{mark:<8}{check['name']:<16}{check['found']}")
        if not check["ok"] and check["remedy"]:
            lines.append(f"{'':<24}{check['remedy']}")
    lines.append(
        "ready: `compress --target cpu --speedup 2x` can run here"
        if found["ready"]
        else "not ready: what is MISSING has to be mended first"
    )
    return "\n".join(lines)


def _python() -> Check:
    return Check(
        name="python",
        found=platform.python_version(),
        ok=sys.version_info >= LEAST_PYTHON,
        required=True,
        remedy=f"install Python {'.'.join(map(str, LEAST_PYTHON))} or newer",
    )


def requirements() -> dict[str, str | None]:
    """The packages that compress needs and their versions here, None for one that is missing."""
    try:
        needed = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        needed = []
    versions: dict[str, str | None] = {}
    for words in needed:
        name = re.match(r"[\w.-]+", words)
        if name is not None and "extra ==" not in words:
            try:
                versions[name[0]] = metadata.version(name[0])
            except metadata.PackageNotFoundError:
                versions[name[0]] = None
    return versions


def _packages() -> Check:
    versions = requirements()
    absent = [name for name, version in versions.items() if version is None]
    present = [f"{name} {version}" for name, version in versions.items() if version is not None]
    return Check(
        name="packages",
        found=f"without {', '.join(absent)}" if absent else ", ".join(present) or "not installed",
        ok=bool(present) and not absent,
        required=True,
        remedy='pip install -c constraints.txt -e ".[dev]"',
    )


def _imports(module: str) -> str | None:
    """Why a module cannot be imported, None when it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken native library may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _torch() -> Check:
    fault = _imports("torch")
    if fault is not None:
        return Check(
            name="torch",
            found=fault,
            ok=False,
            required=True,
            remedy="pip install -c constraints.txt torch",
        )
    import torch

    said = os.environ.get("OMP_NUM_THREADS")
    threads = f"OMP_NUM_THREADS={said}" if said else f"{timing.physical_cores()} threads"
    return Check(name="torch", found=f"{torch.__version__}, works with {threads}", required=True)


def _onnxruntime() -> Check:
    fault = _imports("onnxruntime")
    if fault is not None:
        return Check(
            name="onnxruntime", found=fault, ok=False, required=True, remedy="pip install onnxruntime"
        )
    runtime = importlib.import_module("onnxruntime")
    providers = ", ".join(runtime.get_available_providers())
    return Check(name="onnxruntime", found=f"{runtime.__version__} ({providers})", required=True)


def _tensorrt() -> Check:
    fault = _imports("tensorrt")
    return Check(
        name="tensorrt",
        found="importable" if fault is None else "not installed",
        ok=fault is None,
        remedy="only GPU targets need it, on the GPU's machine: pip install tensorrt. "
        "Without it they are built, and the verdict says NOT MEASURED",
    )


def _gpu() -> Check:
    if _imports("torch") is None:
        import torch

        if torch.cuda.is_available():
            return Check(name="gpu", found=torch.cuda.get_device_name(0))
    driver = "a driver is there, but this torch has no CUDA" if shutil.which("nvidia-smi") else "no GPU"
    return Check(
        name="gpu",
        found=driver,
        ok=False,
        remedy="--target cpu needs none; GPU targets are estimated and exit with 3",
    )


def _processor() -> Check:
    facts = timing.environment()
    return Check(name="processor", found=f"{facts['cpu']} ({facts['flags'] or 'no known flags'})")


def _cores() -> Check:
    cores = timing.physical_cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Check(
        name="cores",
        found=f"{cores} physical, load {load:.1f}",
        ok=load < 0.5 * cores,
        remedy="other work is running and widens every interval: stop it before a run that counts",
    )


def _memory() -> Check:
    free_gb = psutil.virtual_memory().available / 1e9
    return Check(
        name="memory",
        found=f"{free_gb:.1f} GB free of {psutil.virtual_memory().total / 1e9:.1f} GB",
        ok=free_gb >= LEAST_MEMORY_GB,
        remedy="small models only, with memory_mb under [calibration] in a recipe below what is free",
    )


def _disk() -> Check:
    here = Path.cwd()
    free_gb = shutil.disk_usage(here).free / 1e9
    return Check(
        name="disk",
        found=f"{free_gb:.1f} GB free in {here}",
        ok=free_gb >= LEAST_DISK_GB,
        remedy="candidates of a BERT-sized model take gigabytes: use --out on a larger disk",
    )


def _cache() -> Check:
    folder = latency_table.cache_folder()
    fault = _unwritable(folder)
    return Check(
        name="cache",
        found=str(folder) if fault is None else f"{folder}: {fault}",
        ok=fault is None,
        remedy="set COMPRESS_CACHE to a folder of yours; until then every run measures its costs again",
    )


def _unwritable(folder: Path) -> str | None:
    """Why files cannot be created in `folder`, or in the first of its parents that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _demo() -> Check:
    folder = Path(str(resources.files("compress.demo")))
    lacking = [
        name for name in ("config.json", "model.safetensors", "test.csv") if not (folder / name).is_file()
    ]
    return Check(
        name="demo",
        found="the embedded default" if not lacking else f"without {', '.join(lacking)}",
        ok=not lacking,
        remedy="give a MODEL with --data; or install compress again",
    )


def _hub() -> Check:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return Check(
        name="hub",
        found="offline: only directories and cached models" if offline else "asked for hub ids",
    )


def _energy() -> Check:
    found = [meter.name for meter in (Rapl(), Nvml()) if meter.found]
    return Check(
        name="energy",
        found=f"counters can be read: {', '.join(found)}"
        if found
        else "no counter of processor or GPU can be read",
        ok=bool(found),
        remedy="--energy-mj and --power-w stay estimates; where the counters exist, "
        "`sudo chmod -R a+r /sys/class/powercap/intel-rapl*` opens them",
    )


CHECKS: tuple[Callable[[], Check], ...] = (
    _python,
    _packages,
    _torch,
    _onnxruntime,
    _tensorrt,
    _gpu,
    _processor,
    _cores,
    _memory,
    _disk,
    _cache,
    _demo,
    _hub,
    _energy,
)
