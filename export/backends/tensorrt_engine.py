"""What a TensorRT engine is tied to: how, where and from what it was built, in a stamp beside it."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from compress.errors import CompressError
from compress.ir import Document

Range = tuple[int, int, int]


class EngineOptions(Document):
    """How an engine is built; `batch` and `tokens` are (min, opt, max), `opt` being what is made fast.

    `hardware` "ampere_plus" runs on every GPU from compute capability 8.0 on, at a price in speed.
    `version_compatible` runs in later versions of the same major.
    """

    batch: Range = (1, 1, 1)
    tokens: Range = (32, 32, 32)
    sparse: bool = False
    version_compatible: bool = False
    hardware: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    workspace_mb: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "EngineOptions":
        for name in ("batch", "tokens"):
            least, best, most = getattr(self, name)
            if not 1 <= least <= best <= most:
                raise ValueError(f"{name} must be 1 <= min <= opt <= max, not {least}, {best}, {most}")
        return self


class Machine(Document):
    """What an engine is tied to; versions as their makers write them."""

    device: str
    compute_capability: tuple[int, int]
    tensorrt: str
    driver: str


class Sparsity(Document):
    """Layers that a 2:4 kernel was possible for, and those that run with one."""

    eligible: tuple[str, ...] = ()
    picked: tuple[str, ...] = ()


class Stamp(Document):
    """The document beside an engine: where and from what it was built (SHA-256 of both files)."""

    machine: Machine
    options: EngineOptions
    onnx_sha256: str
    engine_sha256: str
    sparsity: Sparsity


def stamp_path(engine: Path) -> Path:
    """Path of the stamp of an engine."""
    return engine.with_name(f"{engine.name}.json")


def mismatch(stamp: Stamp, here: Machine) -> list[str]:
    """Why an engine cannot be loaded here; empty when it can."""
    there, options = stamp.machine, stamp.options
    faults = []
    if not _fits_hardware(there, here, options):
        faults.append(f"GPU {_gpu(there)}, here {_gpu(here)}")
    built, found = numbers(there.tensorrt), numbers(here.tensorrt)
    newer = options.version_compatible and built[0] == found[0] and found >= built
    if there.tensorrt != here.tensorrt and not newer:
        faults.append(f"TensorRT {there.tensorrt}, here {here.tensorrt}")
    if there.driver != here.driver and not options.version_compatible:
        faults.append(f"driver {there.driver}, here {here.driver}")
    return faults


def _fits_hardware(there: Machine, here: Machine, options: EngineOptions) -> bool:
    if options.hardware == "ampere_plus":
        return here.compute_capability >= (8, 0)
    same = there.compute_capability == here.compute_capability
    return same and (options.hardware == "same_compute_capability" or there.device == here.device)


def sparsity(log: Iterable[str], information: str) -> Sparsity:
    """Which layers could run 2:4 kernels by the builder's log, and which do by log and inspector.

    The log's lines begin with `(Sparsity)` and end in the layers' names; a layer of the inspector runs a
    2:4 kernel when its tactic's name says `sparse`.
    """
    eligible: list[str] = []
    picked: list[str] = []
    for line in log:
        found = re.search(r"\(Sparsity\)(.*?):(.*)", line)
        if found:
            names = [name.strip() for name in found[2].split(",") if name.strip()]
            if "eligible" in found[1]:
                eligible += names
            elif re.search(r"pick|chose", found[1], re.IGNORECASE):
                picked += names
    for layer in json.loads(information).get("Layers", []):
        if isinstance(layer, dict) and "sparse" in str(layer.get("TacticName", "")).lower():
            picked.append(str(layer["Name"]))
    picked = list(dict.fromkeys(picked))
    return Sparsity(eligible=tuple(dict.fromkeys([*eligible, *picked])), picked=tuple(picked))


def read_stamp(engine: Path) -> Stamp:
    """The stamp of an engine.

    Raises:
        CompressError: engine or stamp is missing, or the stamp is damaged.
    """
    path = stamp_path(engine)
    for needed in (engine, path):
        if not needed.is_file():
            raise CompressError(f"{needed} does not exist; build the engine on this machine first")
    try:
        return Stamp.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CompressError(
            f"{path} is damaged: {error.errors()[0]['msg']}; build the engine again"
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def _gpu(machine: Machine) -> str:
    return f"{machine.device} (compute capability {'.'.join(map(str, machine.compute_capability))})"


def numbers(version: str) -> tuple[int, ...]:
    """The numbers in a version, to be compared.

    >>> numbers("10.16.1")
    (10, 16, 1)
    """
    return tuple(int(part) for part in re.findall(r"\d+", version))
