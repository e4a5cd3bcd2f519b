"""What the user asked for: words and TOML parsed into a checked `Recipe`, mistakes explained."""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from compress.errors import CompressError
from compress.formats import MOVES, STRUCTURE
from compress.ir import Budget, Document
from compress.sites.kinds import searched
from compress.task_specs import TASKS
from compress.validation import explain

Phase = Literal["prefill", "decode"]
UNITS = {"speedup": "x", "latency_ms": "ms", "energy_mj": "mJ", "power_w": "W", "size_mb": "MB"}


def _searched(name: str) -> str:
    """`name` of a kind of site, after making sure that the search chooses its units."""
    if name not in searched():
        expected = ", ".join(f"'{kind}'" for kind in searched())
        raise PydanticCustomError("literal_error", "must be one of {expected}", {"expected": expected})
    return name


def _move(name: str) -> str:
    """`name` of a move, after making sure that there is one."""
    if name not in MOVES:
        expected = ", ".join(f"'{move}'" for move in MOVES)
        raise PydanticCustomError("literal_error", "must be one of {expected}", {"expected": expected})
    return name


def _known_task(name: str) -> str:
    """`name` of a task, after making sure that there is such a task."""
    if name not in TASKS:
        expected = ", ".join(f"'{task}'" for task in TASKS)
        raise PydanticCustomError("literal_error", "must be one of {expected}", {"expected": expected})
    return name


Move = Annotated[str, AfterValidator(_move)]
SearchedKind = Annotated[str, AfterValidator(_searched)]
TaskName = Annotated[str, AfterValidator(_known_task)]


class Shapes(Document):
    """The input shape that is priced and timed; `tokens` is the sequence length of text models.

    `phase` is what a budget of a decoder is about: reading a prompt of `tokens` ("prefill", the time to
    first token), or one more token after `tokens` of past ("decode", the time per token).
    """

    batch: int = Field(default=1, ge=1, description="Inputs in one run.")
    tokens: int = Field(
        default=32, ge=1, description="Length of text inputs in tokens; at decode, tokens before the new one."
    )
    phase: Phase = Field(
        default="prefill", description="Of a decoder: time to first token (prefill) or per token (decode)."
    )


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

    moves: tuple[Move, ...] = Field(
        default=(STRUCTURE,), min_length=1, description="Techniques that the search may use."
    )
    widths: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.875, 0.75, 0.625, 0.5),
        description="Fractions of the hidden width that the move width tries.",
    )
    kinds: tuple[SearchedKind, ...] = Field(
        default_factory=searched, description="Kinds of site that are searched."
    )
    score: Literal["obs", "magnitude", "wanda", "taylor"] = Field(
        default="obs", description="How units are ranked; obs (ZipLM) also refits the writer."
    )
    blocks: Literal["obs", "fisher"] = Field(
        default="obs", description="How blocks of zeros are ranked; fisher (LPViT) needs labels."
    )
    units: tuple[float, ...] | None = Field(
        default=None, description="Fractions of units to offer instead of measured steps of the latency."
    )
    uniform: bool = Field(
        default=False, description="Give every site the same fraction: the baseline of the search."
    )
    drop: bool = Field(default=True, description="Whether a whole site may be removed.")


class Calibration(Document):
    """How much data the statistics see, and how they are damped (methods 0.2.3)."""

    samples: int = Field(default=2048, ge=1, description="Most inputs that statistics are collected on.")
    batch: int = Field(default=32, ge=1, description="Inputs in one batch of calibration.")
    damping: float = Field(
        default=1e-2, gt=0, description="Added to the diagonal of Hessians, as a fraction of its mean."
    )
    memory_mb: int = Field(
        default=2048, ge=64, description="Memory for statistics in megabytes; more is split into passes."
    )
    refit: bool = Field(
        default=True,
        description="Whether remaining weights are refitted layer by layer on the compressed model.",
    )


class Search(Document):
    """The evolutionary search, which compares plans by their divergence on `samples` calibration inputs."""

    samples: int = Field(
        default=256, ge=1, description="Calibration inputs on which candidate plans are compared."
    )
    generations: int = Field(
        default=24, ge=0, description="Generations of the evolutionary search; 0 keeps the first plan."
    )
    offspring: int = Field(default=6, ge=1, description="Candidate plans in one generation.")
    seed: int = Field(default=0, description="Seed of the search.")


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

    mode: Literal["none", "fast", "full"] = Field(
        default="none", description="No fine-tuning, one course, or courses until the score stops rising."
    )
    epochs: int = Field(default=4, ge=1, description="Passes over the training inputs in one course.")
    courses: int = Field(default=6, ge=1, description="Most courses in mode full.")
    samples: int = Field(default=16384, ge=1, description="Most training inputs.")
    batch: int = Field(default=32, ge=1, description="Training inputs in one step.")
    rate: float = Field(default=5e-4, ge=0, description="Peak learning rate.")
    warmup: float = Field(
        default=0.1, ge=0, le=1, description="Fraction of steps in which the learning rate rises."
    )
    decay: float = Field(default=0.01, ge=0, description="Weight decay.")
    clip: float = Field(default=1.0, gt=0, description="Largest norm of gradients.")
    temperature: float = Field(default=2.0, gt=0, description="Temperature of the distillation of outputs.")
    task: float = Field(default=0.1, ge=0, description="Weight of the loss on labels.")
    logits: float = Field(
        default=1.0, ge=0, description="Weight of the distance to the dense model's outputs."
    )
    hidden: float = Field(
        default=1.0, ge=0, description="Weight of the distance to the dense model's hidden states."
    )
    ranking: float = Field(
        default=1.0, ge=0, description="Weight of the loss on similarities within a batch (embeddings only)."
    )
    features: float = Field(default=0.0, ge=0, description="Weight of GPUSQ's distance of hidden states.")
    late: float = Field(
        default=1 / 3,
        gt=0,
        le=1,
        description="Fraction of the layers, counted from the last, that features covers.",
    )
    gated: bool = Field(
        default=True, description="Whether features counts only inputs on which both models agree."
    )
    staged: bool = Field(
        default=True, description="Train in floating point first, then in the deployed format."
    )
    validation: int = Field(
        default=4096, ge=1, description="Most inputs of the validation split that choose a checkpoint."
    )
    cache_mb: int = Field(
        default=1024, ge=0, description="Disk space in megabytes for outputs of the dense model."
    )
    checkpoint_s: float = Field(
        default=60.0, ge=0, description="Seconds between checkpoints of the training."
    )
    adapter: Literal["none", "sltrain"] = Field(
        default="none", description="Train all weights, or low-rank plus sparse updates of them (sltrain)."
    )
    rank: int = Field(default=16, ge=1, description="Rank of sltrain's update.")
    density: float = Field(
        default=0.03, gt=0, le=1, description="Fraction of weights in sltrain's sparse update."
    )
    shard: bool = Field(
        default=False, description="Shard weights, gradients and moments among processes (FSDP2)."
    )
    seed: int = Field(default=0, description="Seed of the training.")


class Bench(Document):
    """The timing protocol: at least 30 interleaved blocks, threads up to the physical cores."""

    threads: int = Field(default=1, ge=1, description="Threads of the runtime, at most the physical cores.")
    blocks: int = Field(default=40, ge=30, description="Interleaved timing blocks for each model.")
    block_ms: float = Field(default=60.0, gt=0, description="Duration of one timing block in milliseconds.")
    rounds: int = Field(
        default=6, ge=1, description="Most iterations of the loop that builds, times and searches again."
    )


D = TypeVar("D", bound=Document)


class Recipe(Document):
    """A whole request. Everything but the target and a budget has a default that works untouched.

    Several `speedups` ask for a family: one model for each, and `budget` is that of the first.
    """

    model: str | None = Field(
        default=None, description="Hugging Face directory or hub id, or package.module:factory."
    )
    data: str | None = Field(default=None, description="Inputs with labels: a file or a folder.")
    test: str | None = Field(default=None, description="Inputs for the score; held out of data when not set.")
    task: TaskName | None = Field(
        default=None,
        description=f"Task of the model: {', '.join(TASKS)}; read from its config when not set.",
    )
    text: str | None = Field(
        default=None, description="Column of text; found by its name or type when not set."
    )
    label: str | None = Field(
        default=None, description="Column of labels; found by its name or type when not set."
    )
    target: str = Field(description="Name of the device, from `compress targets`.")
    budget: Budget
    speedups: tuple[Annotated[float, Field(gt=1)], ...] = Field(
        default=(), description="Several speedups, which make a family of models."
    )
    max_drop: float | None = Field(
        default=None, ge=0, description="Maximum allowed score drop, as a fraction."
    )
    out: str = Field(default="out", description="Output directory.")
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
            tables += [f"{name} = {toml(item)}" for name, item in value.items()]
        else:
            lines.append(f"{key} = {toml(value)}")
    return "\n".join(lines + tables) + "\n"


def toml(value: Any) -> str:
    """A value as it stands in a TOML file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return repr(value)
