"""What is known of each device: facts with units and sources, and the tables measured on it.

A profile states what a data sheet says; what only a measurement can say lies beside it in
`<name>.<origin>.json` (`onnxruntime`, `tensorrt`, `torch-cuda`: the runtime). `published_latencies.csv`
holds latencies that vendors state, with their sources; the roofline is checked against them.
"""

import difflib
import json
import re
import tomllib
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from compress.errors import CompressError

if __name__ != "compress.profiles":
    raise ImportError(f"import this folder as 'compress.profiles', not as {__name__!r}")

Runtime = Literal["onnxruntime", "tensorrt"]
SPELLED = {"rpi": r"raspberry\s+pi"}


class Profile(BaseModel):
    """Facts about one device.

    Attributes:
        name: what `--target` calls it.
        kind: what the roofline treats it as.
        runtime: what executes the exported file there.
        description: one line for people.
        peak_tflops: dense peak by precision, whole device; `"fp16 2:4"` is the sparse peak.
        bandwidth_gb_s: peak of the main memory.
        memory_gb: its size.
        cache_mb: the last-level cache (L2 of a GPU).
        processors: streaming multiprocessors of a GPU, cores of a CPU.
        launch_us: what one operator costs before it does anything.
        align_units: widths that are not a multiple of this waste lanes.
        idle_w: power with nothing to do; None where nobody states it.
        load_w: power limit, or power under full load.
        patterns: zero patterns that the runtime turns into time.
        precisions: precisions that can be chosen.
        baseline_precision: what the dense model is measured in.
        source: where the facts come from, by key; `"*"` is the document behind all others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    kind: Literal["cpu", "gpu"]
    runtime: Runtime
    description: str
    peak_tflops: dict[str, float]
    bandwidth_gb_s: float = Field(gt=0)
    memory_gb: float = Field(gt=0)
    cache_mb: float = Field(gt=0)
    processors: int = Field(ge=1)
    launch_us: float = Field(ge=0)
    align_units: int = Field(ge=1)
    idle_w: float | None = Field(default=None, ge=0)
    load_w: float | None = Field(default=None, gt=0)
    patterns: tuple[str, ...] = ("dense",)
    precisions: tuple[str, ...]
    baseline_precision: str
    source: dict[str, str]

    @property
    def measured_here(self) -> bool:
        """Whether the target is the machine at hand, so that costs are measured and not looked up."""
        return self.name == "cpu"


def names() -> list[str]:
    """All targets, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files("compress.profiles").iterdir()
        if entry.name.endswith(".toml")
    )


def load(name: str) -> Profile:
    """The profile called `name`.

    Raises:
        CompressError: there is none (with the nearest names), or its file is damaged.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 3, 0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise CompressError(f"target {name!r} is not known.{hint} Known: {', '.join(known)}")
    text = (resources.files("compress.profiles") / f"{name}.toml").read_text(encoding="utf-8")
    return parse(text, name)


def means(name: str, words: str) -> bool:
    """Whether a device's own words hold every part of a target's name, e.g. `orin` and `nano`.

    >>> means("rtx4090", "NVIDIA GeForce RTX 4090"), means("h100", "NVIDIA GH100")
    (True, False)
    """
    parts = [part for part in name.split("-") if part != "cpu"]
    return bool(parts) and all(re.search(_pattern(part), words.lower()) for part in parts)


def _pattern(part: str) -> str:
    """`rtx4090` as it may be written: not inside another word, and no digit more."""
    pieces = [SPELLED.get(piece, piece) for piece in re.findall(r"[a-z]+|\d+", part)]
    return r"(?<![a-z0-9])" + r"[\s-]*".join(pieces) + r"(?!\d)"


def parse(text: str, name: str) -> Profile:
    """The profile in a TOML text; `name` is its file's name and becomes the profile's.

    Raises:
        CompressError: the text is not TOML, or a fact is missing, unknown or out of range.
    """
    try:
        return Profile.model_validate({**tomllib.loads(text), "name": name})
    except tomllib.TOMLDecodeError as error:
        raise CompressError(f"profile {name}: not TOML ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        near = difflib.get_close_matches(key, sorted(Profile.model_fields), 1)
        hint = f"; did you mean {near[0]!r}?" if near and key not in near else ""
        raise CompressError(f"profile {name}: {key!r}: {first['msg']}{hint}") from error


def measured(name: str, origin: str) -> dict[str, JsonValue] | None:
    """The table that ships for a device and a runtime, None when there is none."""
    if not (re.fullmatch(r"[\w-]+", name) and re.fullmatch(r"[\w-]+", origin)):
        return None  # never leave the folder
    path = resources.files("compress.profiles") / f"{name}.{origin}.json"
    if not path.is_file():
        return None
    table: dict[str, JsonValue] = json.loads(path.read_text(encoding="utf-8"))
    return table
