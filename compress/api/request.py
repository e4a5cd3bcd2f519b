"""A request in words or values, as the command line and the Python API take it, made into a `Recipe`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from compress import recipe as recipes
from compress.errors import CompressError
from compress.ir import BUDGETS, Budget
from compress.recipe import Recipe, Shapes

PLAIN = ("model", "target", "data", "test", "task", "text", "label", "max_drop", "out")
TABLES = {"shapes": ("batch", "tokens", "phase"), "bench": ("threads",), "search": ("seed",)}
OTHERS = ("rate_hz", "recover", "moves", *(name for names in TABLES.values() for name in names))
NAMES = (*PLAIN, *BUDGETS, *OTHERS)


class Request(TypedDict, total=False):
    """The options of `compress run` but for the speedup, under their names; what is left out has a default.

    Attributes:
        target: the device; `compress.targets()` lists them.
        latency_ms: budget: median latency in milliseconds.
        energy_mj: budget: energy of one run in millijoules.
        power_w: budget: average power in watts, at `rate_hz`.
        rate_hz: runs a second.
        size_mb: budget: size of the file in megabytes.
        data: inputs with labels, a file or a folder.
        test: inputs for the score, if `data` has no test part.
        task: what the model does, if its config does not say.
        text: the text column, if it is not found.
        label: the label column, if it is not found.
        moves: techniques to search, a list or words between commas.
        recover: "none", "fast" or "full".
        max_drop: maximum allowed drop of the score, as a fraction.
        out: the output directory; "out" unless given.
        batch: inputs in one run; 1 unless given.
        tokens: length of a text input; 32 unless given.
        phase: of a decoder, "prefill" or "decode".
        threads: of the runtime; 1 unless given.
        seed: of the search; 0 unless given.
    """

    target: str | None
    latency_ms: float | str | None
    energy_mj: float | str | None
    power_w: float | str | None
    rate_hz: float | None
    size_mb: float | str | None
    data: str | Path | None
    test: str | Path | None
    task: str | None
    text: str | None
    label: str | None
    moves: str | Sequence[str] | None
    recover: str | None
    max_drop: float | None
    out: str | Path | None
    batch: int | None
    tokens: int | None
    phase: str | None
    threads: int | None
    seed: int | None


def make(source: Recipe | str | Path | None, request: Mapping[str, Any]) -> Recipe:
    """The recipe that `request` asks for, laid over a recipe or the TOML file that `source` names.

    Args:
        source: a whole request, its file, or None.
        request: options of `compress run` by name; None stands for what was not given. Values are numbers
            or words with a unit ("2x"), `moves` is a list or words between commas, several speedups a family.

    Raises:
        CompressError: an option is unknown or malformed, budgets contradict each other, or target or budget
            is missing.
    """
    given = {name: value for name, value in request.items() if value is not None}
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise CompressError(f"{unknown[0]!r} is no option of a compilation; known: {', '.join(NAMES)}")
    values = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    asked = {name: values[name] for name in PLAIN if name in values}
    budgets = _budgets(values)
    if budgets:
        asked["budget"] = budgets[0]
        asked["speedups"] = [one.value for one in budgets] if len(budgets) > 1 else []
    for table, names in TABLES.items():
        asked[table] = {name: values[name] for name in names if name in values}
    if "recover" in values:
        asked["recovery"] = {"mode": values["recover"]}
    if "moves" in values:
        moves = values["moves"]
        asked["options"] = {
            "moves": [move.strip() for move in (moves.split(",") if isinstance(moves, str) else moves)]
        }
    if isinstance(source, Recipe):
        return recipes.overlaid(source, asked)
    return recipes.read(None if source is None else Path(source), asked)


def names_budget(path: Path) -> bool:
    """Whether a recipe in a TOML file names a budget.

    Raises:
        CompressError: the file cannot be read.
    """
    values = recipes.values_of(path)
    return bool(values.get("budget") or values.get("speedups"))


def shapes(**given: int | str | None) -> Shapes:
    """The input shape of `batch`, `tokens` and `phase`, with defaults for what is None.

    Raises:
        CompressError: one of them is no such value.
    """
    return recipes.checked(Shapes, {name: value for name, value in given.items() if value is not None})


def _budgets(values: Mapping[str, Any]) -> list[Budget]:
    """The budget among the values, none without any; several only where they ask for a family."""
    given = {name: values[name] for name in BUDGETS if name in values}
    if len(given) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in given)
        raise CompressError(f"{flags} were both given; a run has one budget, so leave out all but one")
    rate_hz = values.get("rate_hz")
    for name, value in given.items():
        parts = _parts(value)
        if len(parts) > 1 and name != "speedup":
            raise CompressError(
                f"--{name.replace('_', '-')} {','.join(parts)} names several budgets; only --speedup makes a "
                "family of models, so run the command once for each"
            )
        return [_at_rate(recipes.parse_budget(name, part), rate_hz) for part in parts]
    if rate_hz is not None:
        raise CompressError(
            "--rate-hz goes with --power-w; give both on the command line or both in the recipe"
        )
    return []


def _parts(value: object) -> list[str]:
    """A budget as words: one, or several of a family."""
    if isinstance(value, str):
        return value.split(",")
    if isinstance(value, Sequence):
        return [str(part) for part in value]
    return [str(value)]


def _at_rate(budget: Budget, rate_hz: float | None) -> Budget:
    """The budget with the rate of runs that average power depends on."""
    if rate_hz is None:
        return budget
    if budget.power_w is None or not 0 < rate_hz < float("inf"):
        raise CompressError(f"--rate-hz {rate_hz:g} must be above zero, and goes with --power-w only")
    return budget.model_copy(update={"rate_hz": rate_hz})
