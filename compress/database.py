"""Every candidate of every site, built once, one site at a time, and answered from for any budget."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress import calibrate
from compress.calibrate import Statistics
from compress.core import obs, scores
from compress.errors import CompressError
from compress.ir import Site
from compress.surgery import Removal, writer_columns, writer_tensors

PARTS = ("kept", "weight", "bias")
Errors = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Candidate:
    """Kept units, the writer's kept columns [out, kept * width], its bias [out], the layer error."""

    kept: Tensor
    weight: Tensor
    bias: Tensor
    error: float


def build(
    model: nn.Module,
    sites: Sequence[Site],
    statistics: Path,
    levels: Mapping[str, Sequence[int]],
    directory: Path,
    *,
    score: str = "obs",
    damping: float = 1e-2,
    progress: Callable[[int, int], None] | None = None,
) -> Errors:
    """Write `directory/<index>.safetensors` for every site; the layer errors by site and units.

    Args:
        model: the dense model.
        sites: in the order of the statistics.
        statistics: what `calibrate.collect` wrote.
        levels: units kept by site name, the dense width left out; 0 drops the site.
        directory: sites that are whole there already are not built again.
        score: "obs" refits what stays; "magnitude", "wanda" and "taylor" only choose it.
        damping: relative to each diagonal entry of the second moments.
        progress: called with sites done and sites in all.
    """
    errors: Errors = {}
    for index, site in enumerate(sites):
        wanted = sorted(set(levels[site.name]))
        found = _stored(directory, index, wanted)
        if found is None:
            moments = calibrate.read(statistics, index)
            made = _build_site(model, site, moments, wanted, damping, score)
            found = _write(_path(directory, index), made)
        errors[site.name] = found
        if progress is not None:
            progress(index + 1, len(sites))
    return errors


def removal(directory: Path, index: int, units: int) -> Removal:
    """One stored candidate.

    Raises:
        CompressError: it is not there, or its file is damaged.
    """
    path = _path(directory, index)
    try:
        with safe_open(path, framework="pt") as file:
            kept, weight, bias = (file.get_tensor(f"{units}/{part}") for part in PARTS)
    except (OSError, SafetensorError) as error:
        raise CompressError(f"{path} is missing or damaged ({error}); run again to rebuild it") from error
    return Removal(kept=kept, weight=weight, bias=bias)


def _write(path: Path, made: Mapping[int, Candidate]) -> dict[int, float]:
    """Store the candidates of one site whole or not at all; their errors."""
    tensors = {}
    for units, one in made.items():
        tensors[f"{units}/kept"] = one.kept.contiguous()
        tensors[f"{units}/weight"] = one.weight.contiguous()
        tensors[f"{units}/bias"] = one.bias.contiguous()
    errors = {units: one.error for units, one in made.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    save_file(tensors, half, metadata={"errors": json.dumps(errors)})
    half.replace(path)
    return errors


def _path(directory: Path, index: int) -> Path:
    return directory / f"{index:03d}.safetensors"


def _stored(directory: Path, index: int, levels: Sequence[int]) -> dict[int, float] | None:
    """The errors in a file that is whole and holds every level, else None."""
    try:
        with safe_open(_path(directory, index), framework="pt") as file:
            found = {int(k): float(v) for k, v in json.loads(file.metadata()["errors"]).items()}
            names = set(file.keys())
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    wanted = {f"{units}/{part}" for units in levels for part in PARTS}
    return found if wanted <= names and set(levels) <= set(found) else None


def _build_site(
    model: nn.Module,
    site: Site,
    statistics: Statistics,
    levels: Sequence[int],
    damping: float,
    score: str,
) -> dict[int, Candidate]:
    """All candidates of one site, by units kept."""
    weight = writer_columns(model, site).detach().double()
    _, bias = writer_tensors(model, site)  # its own, or one that it gained when it was pruned before
    own = torch.zeros(len(weight)) if bias is None else bias
    if score not in SELECTIONS:
        found: dict[int, Candidate] = {}
        solved = obs.solve(
            weight, statistics.second, statistics.mean, levels, width=site.column.width, damping=damping
        )
        for level in solved:
            bias = (own + level.shift).float()
            found[len(level.kept)] = Candidate(level.kept, level.weight.float(), bias, level.error)
        return found
    ranked = SELECTIONS[score](weight, statistics, site.column.width)
    return {units: _selected(weight, own, ranked, statistics, units, site.column.width) for units in levels}


def _selected(
    weight: Tensor, own: Tensor, ranked: Tensor, statistics: Statistics, units: int, width: int
) -> Candidate:
    """A baseline: the best `units` units with the writer's own columns, nothing refitted."""
    kept = scores.best(ranked, units)
    stay = obs.columns(kept, width)
    lost = weight.clone()
    lost[:, stay] = 0
    centered = statistics.second - torch.outer(statistics.mean, statistics.mean)
    # Nothing makes up for the mean here, so the lost mean is damage too.
    damage = float(((lost @ statistics.second) * lost).sum())
    total = float(((weight @ centered) * weight).sum())
    return Candidate(kept, weight[:, stay].float(), own.float().clone(), damage / total if total > 0 else 0.0)


def _taylor(_: Tensor, statistics: Statistics, width: int) -> Tensor:
    if statistics.taylor is None:
        raise CompressError("no first-order scores were collected; calibrate with score = taylor")
    return scores.taylor(statistics.taylor, width)


SELECTIONS: dict[str, Callable[[Tensor, Statistics, int], Tensor]] = {
    "magnitude": lambda weight, _, width: scores.magnitude(weight, width),
    "wanda": lambda weight, found, width: scores.wanda(weight, found.second.diagonal(), width),
    "taylor": _taylor,
}
