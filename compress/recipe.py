"""What the user asked for: words and TOML parsed into a checked `Recipe`, mistakes explained."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from compress.errors import CompressError
from compress.ir import Budget, Document
from compress.sites.kinds import searched

Move = Literal["structure", "width", "int8", "int8-static", "int4", "fp8", "block", "lowrank", "2:4"]
TaskName = Literal["text-classification", "image-classification", "feature-extraction", "text-generation"]
Phase = Literal["prefill", "decode"]
UNITS = {"speedup": "x", "latency_ms": "ms", "energy_mj": "mJ", "power_w": "W", "size_mb": "MB"}


def _searched(name: str) -> str:
    """`name` of a kind of site, after making sure that the search chooses its units."""
    if name not in searched():
        expected = ", ".join(f"'{kind}'" for kind in searched())
        raise PydanticCustomError("literal_error", "must be one of {expected}", {"expected": expected})
    return name


SearchedKind = Annotated[str, AfterValidator(_searched)]


class Shapes(Document):
    """The input shape that is priced and timed; `tokens` is the sequence length of text models.

    `phase` is what a budget of a decoder is about: reading a prompt of `tokens` ("prefill", the time to
    first token), or one more token after `tokens` of past ("decode", the time per token).
    """

    batch: int = Field(default=1, ge=1)
    tokens: int = Field(default=32, ge=1)
    phase: Phase = "prefill"


class Options(Document):
    """Which moves the search may use.

    `moves` are the ways to make a site cheaper; the search mixes them, and one that does not pay on the
    target is never chosen.
    `score` chooses how units are ranked and whether the writer is refitted ("obs" is ZipLM; the
    others are baselines without a refit). `units` fixes the fractions kept instead of the measured
    staircase. `blocks` chooses how blocks of zeros are ranked: "obs" removes them one at a time with
    compensation, "fisher" is LPViT's saliency, from each sample's own gradient; both refit what stays.
    `uniform` gives every site the same fraction, the baseline of the search. `widths` are the
    fractions of the hidden width that the move "width" tries.
    """

    moves: tuple[Move, ...] = Field(default=("structure",), min_length=1)
    widths: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.875, 0.75, 0.625, 0.5)
    kinds: tuple[SearchedKind, ...] = Field(default_factory=searched)
    score: Literal["obs", "magnitude", "wanda", "taylor"] = "obs"
    blocks: Literal["obs", "fisher"] = "obs"
    units: tuple[float, ...] | None = None
    uniform: bool = False
    drop: bool = True


class Calibration(Document):
    """How much data the statistics see, and how they are damped (methods 0.2.3)."""

    samples: int = Field(default=2048, ge=1)
    batch: int = Field(default=32, ge=1)
    damping: float = Field(default=1e-2, gt=0)
    memory_mb: int = Field(default=2048, ge=64)
    refit: bool = True


class Search(Document):
    """How long the stitched model is asked; `samples` calibration inputs judge every trial."""

    samples: int = Field(default=256, ge=1)
    generations: int = Field(default=24, ge=0)
    offspring: int = Field(default=6, ge=1)
    seed: int = 0


class Recovery(Document):
    """How quality is won back after pruning, by distilling from the dense model; time does not change.

    What a plan runs on integers or as factors learns in that form: through rounding, as factors. Where
    it also removes something, it learns in floats first, and its floats are the teacher then (`two_stage`).
    `mode` "fast" tunes for one course of `epochs`; "full" goes on with further courses, each from the
    best weights so far, until one no longer raises the score on the validation split, `courses` at most.
    After a course that made every epoch worse the next one has a fifth of the `rate`, in "fast" as well.
    `task`, `logits`, `hidden` and `ranking` (embeddings only) weigh the losses; labels are used where
    there are some. `features` weighs GPUSQ's distance of hidden states: that of the `late` share of the
    layers, on inputs that student and teacher answer alike (unless `gated` is off), each layer counting by
    how near the course before brought it. GPUSQ itself is task 1, logits 10, hidden 0, features 5.
    `cache_mb` bounds what the teacher's answers take on disk.
    `adapter` "sltrain" leaves the weights of linear layers as they are and learns an update of each: two
    factors of `rank` and values at a `density` share of fixed places, folded in at the end.
    `shard` cuts weights, gradients and moments of what is tuned among several processes (FSDP2), for models
    whose training does not fit into the memory of one; alone it changes nothing.
    """

    mode: Literal["none", "fast", "full"] = "none"
    epochs: int = Field(default=4, ge=1)
    courses: int = Field(default=6, ge=1)
    samples: int = Field(default=16384, ge=1)
    batch: int = Field(default=32, ge=1)
    rate: float = Field(default=5e-4, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=2.0, gt=0)
    task: float = Field(default=0.1, ge=0)
    logits: float = Field(default=1.0, ge=0)
    hidden: float = Field(default=1.0, ge=0)
    ranking: float = Field(default=1.0, ge=0)
    features: float = Field(default=0.0, ge=0)
    late: float = Field(default=1 / 3, gt=0, le=1)
    gated: bool = True
    staged: bool = True
    validation: int = Field(default=4096, ge=1)
    cache_mb: int = Field(default=1024, ge=0)
    checkpoint_s: float = Field(default=60.0, ge=0)
    adapter: Literal["none", "sltrain"] = "none"
    rank: int = Field(default=16, ge=1)
    density: float = Field(default=0.03, gt=0, le=1)
    shard: bool = False
    seed: int = 0


class Bench(Document):
    """The timing protocol: at least 30 interleaved blocks, threads up to the physical cores."""

    threads: int = Field(default=1, ge=1)
    blocks: int = Field(default=40, ge=30)
    block_ms: float = Field(default=60.0, gt=0)
    rounds: int = Field(default=6, ge=1)


D = TypeVar("D", bound=Document)


class Recipe(Document):
    """A whole request. Everything but the target and a budget has a default that works untouched.

    Several `speedups` ask for a family: one model for each, and `budget` is that of the first.
    """

    model: str | None = None
    data: str | None = None
    test: str | None = None
    task: TaskName | None = None
    text: str | None = None
    label: str | None = None
    target: str
    budget: Budget
    speedups: tuple[Annotated[float, Field(gt=1)], ...] = ()
    max_drop: float | None = Field(default=None, ge=0)
    out: str = "out"
    shapes: Shapes = Shapes()
    options: Options = Field(default_factory=Options)
    calibration: Calibration = Calibration()
    search: Search = Search()
    recovery: Recovery = Recovery()
    bench: Bench = Bench()


def parse_budget(name: str, words: str) -> Budget:
    """One budget from words such as `2x`, `1.5`, `5ms` (the unit may be left out).

    >>> parse_budget("speedup", "2x").speedup
    2.0
    """
    flag = "--" + name.replace("_", "-")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", words)
    if match is None or match[2].lower() not in ("", UNITS[name].lower()):
        example = {"speedup": "2x", "latency_ms": "5", "energy_mj": "20", "power_w": "15"}
        raise CompressError(
            f"{flag} {words!r} is not a budget; write for example {flag} {example.get(name, '30')}"
        )
    value = float(match[1])
    if name == "speedup" and value <= 1:
        raise CompressError(f"{flag} {words} asks for no gain; a speedup is above 1, e.g. 1.5x")
    if value <= 0:
        raise CompressError(f"{flag} {words} must be above zero")
    return Budget(**{name: value})


def _known(model: type[Document], path: tuple[str | int, ...]) -> list[str]:
    """The keys that the table at `path` may hold."""
    for step in path:
        kind = model.model_fields[str(step)].annotation if step in model.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, Document)):
            break
        model = kind
    return sorted(model.model_fields)


def _line(text: str, path: tuple[str | int, ...]) -> int:
    """The line of a TOML file that sets the key at `path`, 1 when it cannot be told."""
    table: tuple[str, ...] = ()
    want = tuple(str(step) for step in path)
    for number, line in enumerate(text.splitlines(), 1):
        header = re.fullmatch(r"\s*\[\s*([\w.]+)\s*\]\s*(#.*)?", line)
        if header:
            table = tuple(header[1].split("."))
            if table == want:
                return number
            continue
        key = re.match(r"\s*([\w.]+)\s*=", line)
        if key:
            full = table + tuple(key[1].split("."))
            if full == want or (full == want[: len(full)] and "{" in line):
                return number
    return 1


def explain(error: ValidationError, model: type[Document], where: str, text: str = "") -> str:
    """The first mistake of a document in one sentence: place, key, nearest known key or reason."""
    problem = error.errors()[0]
    path = problem["loc"]
    place = f"{where} line {_line(text, path)}" if text else where
    key = str(path[-1]) if path else "document"
    table = ".".join(str(step) for step in path[:-1])
    inside = f" in [{table}]" if table else ""
    if problem["type"] == "extra_forbidden":
        known = _known(model, path[:-1])
        near = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"{place}: unknown key {key!r}{inside}{hint} Known: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{place}: {key!r}{inside} is missing; it has no default"
    if problem["type"] == "literal_error":
        return f"{place}: {_no_choice(path, problem)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {key!r}{inside} {message} (found {problem['input']!r})"


def _no_choice(path: tuple[str | int, ...], problem: ErrorDetails) -> str:
    """A word that is none of those that may stand there, and the nearest of them."""
    known = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    names = [step for step in path if isinstance(step, str)]
    inside = f" in [{'.'.join(names[:-1])}]" if names[1:] else ""
    near = difflib.get_close_matches(str(problem["input"]), known, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{names[-1]!r}{inside} cannot be {problem['input']!r}{hint} Known: {', '.join(known)}"


def read(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """The recipe in a TOML file, with the command line's words laid over it.

    Raises:
        CompressError: the file is missing or malformed (with the line and the nearest key).
    """
    if path is None:
        return _complete({}, overrides, "request")
    text, values = _parsed(path)
    return _complete(values, overrides, str(path), text)


def values_of(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, not yet checked.

    Raises:
        CompressError: it cannot be read, or is not TOML.
    """
    return _parsed(path)[1]


def _parsed(path: Path) -> tuple[str, dict[str, Any]]:
    """A TOML file as text and as values."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except OSError as error:
        raise CompressError(f"--recipe {path} cannot be read ({error.strerror}); give a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CompressError(f"{path} is not TOML: {error}") from error


def overlaid(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """A recipe with other values laid over it.

    Raises:
        CompressError: a value is none that its key may have.
    """
    return _complete(recipe.model_dump(), overrides, "request")


def checked(kind: type[D], values: dict[str, Any]) -> D:
    """One table of a recipe from its values.

    Raises:
        CompressError: a key or value is wrong; the message names the nearest one.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise CompressError(explain(error, kind, "request")) from error


def _complete(values: dict[str, Any], overrides: dict[str, Any], where: str, text: str = "") -> Recipe:
    """The recipe of `values` with `overrides` laid over them, checked as a whole."""
    for key, value in overrides.items():
        if value is None:
            continue
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = {**values[key], **value}
        else:
            values[key] = value
    if values.get("speedups") and "budget" not in values:
        values["budget"] = {"speedup": values["speedups"][0]}
    for key, ask in (("target", "--target cpu"), ("budget", "--speedup 2x")):
        if key not in values:
            raise CompressError(f"no {key} was given; add for example {ask}")
    try:
        found = Recipe.model_validate(values)
    except ValidationError as error:
        raise CompressError(explain(error, Recipe, where, text)) from error
    if found.budget.power_w is not None and found.budget.rate_hz is None:
        raise CompressError(no_rate(found.budget.power_w))
    return found


def no_rate(power_w: float) -> str:
    """Why a power budget needs a rate of runs, and what to say instead."""
    return (
        f"--power-w {power_w:g} needs --rate-hz: a device that never rests draws its full power whatever the "
        "model; at a given rate of runs a smaller one lets it rest longer, which is what lowers its power.\n"
        f"  Say how often it is asked, e.g. --power-w {power_w:g} --rate-hz 50, or bound one run: --energy-mj"
    )


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML, which `read` turns back into the same recipe."""
    lines: list[str] = []
    tables: list[str] = []
    for key, value in recipe.model_dump(mode="json", exclude_none=True).items():
        if isinstance(value, dict):
            tables.append(f"\n[{key}]")
            tables += [f"{name} = {_toml(item)}" for name, item in value.items()]
        else:
            lines.append(f"{key} = {_toml(value)}")
    return "\n".join(lines + tables) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)
