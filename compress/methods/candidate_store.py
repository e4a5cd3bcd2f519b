"""Build and store every candidate of every site, one site at a time; searches for any budget reuse them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.calibration import activation_statistics, block_saliency
from compress.calibration.activation_statistics import Statistics
from compress.core import obs, scores
from compress.core.fakequant import Quantized
from compress.errors import CompressError
from compress.ir import Option, Site
from compress.methods import apply
from compress.sites.prune import Removal, take_snapshot, writer_columns

PARTS = ("kept", "weight", "bias")
READER, LEFT, RIGHT, CODES, STEP, READ = "reader/", "left/", "right/", "codes/", "step/", "read/"
Errors = dict[str, dict[str, float]]
Candidate = tuple[Removal, float]  # the weights under one option, complete, and their layer error


def build(
    model: nn.Module,
    sites: Sequence[Site],
    statistics: Path,
    options: Mapping[str, Sequence[Option]],
    directory: Path,
    *,
    score: str = "obs",
    damping: float = 1e-2,
    saliency: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Errors:
    """Write `directory/<index>.safetensors` for every site; returns layer errors by site and option.

    Args:
        model: the dense model.
        sites: in the order of the statistics.
        statistics: the output of `activation_statistics.collect`.
        options: by site name, without the dense one; 0 units drop the site.
        directory: sites with a complete file there are not built again.
        score: "obs" selects units and refits the rest; "magnitude", "wanda" and "taylor" only select.
        damping: relative to each diagonal entry of the second moments.
        saliency: the output of `block_saliency.collect`, to rank weight blocks by it.
        progress: called with sites done and the number of sites.
    """
    errors: Errors = {}
    for index, site in enumerate(sites):
        wanted = options[site.name]
        found = _stored(directory, index, wanted)
        if found is None:
            moments = activation_statistics.read(statistics, index)
            if saliency is not None:
                moments = replace(moments, saliency=block_saliency.read(saliency, index))
            made = _build_site(model, site, moments, wanted, damping, score)
            found = _write(_path(directory, index), made)
        errors[site.name] = found
        if progress is not None:
            progress(index + 1, len(sites))
    return errors


def removal(directory: Path, index: int, option: Option) -> Removal:
    """One stored candidate.

    Raises:
        CompressError: its file is missing or damaged.
    """
    path, prefix = _path(directory, index), f"{option.key}/"
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in list(file.keys()) if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        return unpacked(tensors, option.form)
    except (OSError, SafetensorError, KeyError) as error:
        raise CompressError(f"{path} is missing or damaged ({error}); run again to rebuild it") from error


def packed(one: Removal) -> dict[str, Tensor]:
    """The tensors of a removal by name; with `form` they describe it completely."""
    parts = zip(PARTS, (one.kept, one.weight, one.bias), strict=True)
    tensors = {name: value for name, value in parts if value is not None}
    tensors |= {READER + name: value for name, value in one.readers.items()}
    for name, (left, right) in one.factors.items():
        tensors |= {LEFT + name: left, RIGHT + name: right}
    for name, found in one.codes.items():
        tensors |= {CODES + name: found.codes, STEP + name: found.step}
        if found.input_step is not None:
            tensors[READ + name] = torch.tensor([found.input_step, found.input_zero], dtype=torch.float64)
    return tensors


def unpacked(tensors: Mapping[str, Tensor], form: str) -> Removal:
    """The inverse of `packed`."""
    precision = Option.of(form, None).precision
    left, codes = below(tensors, LEFT), below(tensors, CODES)
    return Removal(
        tensors["kept"],
        tensors.get("weight"),
        tensors.get("bias"),
        below(tensors, READER),
        form,
        {name: (value, tensors[RIGHT + name]) for name, value in left.items()},
        {
            name: _quantized(precision, value, tensors[STEP + name], tensors.get(READ + name))
            for name, value in codes.items()
        },
    )


def _quantized(precision: str, codes: Tensor, step: Tensor, read: Tensor | None) -> Quantized:
    """A stored quantized weight; `read` has the step and zero point of a static input range, else None."""
    fixed = () if read is None else (float(read[0]), int(read[1]))
    return Quantized(precision, codes, step, *fixed)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _write(path: Path, made: Mapping[str, Candidate]) -> dict[str, float]:
    """Store the candidates of one site atomically; their errors."""
    tensors: dict[str, Tensor] = {}
    for key, (one, _) in made.items():
        tensors |= {f"{key}/{name}": value for name, value in packed(one).items()}
    errors = {key: error for key, (_, error) in made.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    whole = {name: value.contiguous() for name, value in tensors.items()}
    save_file(whole, half, metadata={"errors": json.dumps(errors)})
    half.replace(path)
    return errors


def _path(directory: Path, index: int) -> Path:
    return directory / f"{index:03d}.safetensors"


def _stored(directory: Path, index: int, options: Sequence[Option]) -> dict[str, float] | None:
    """The errors in a complete file with every option, else None."""
    try:
        with safe_open(_path(directory, index), framework="pt") as file:
            found = {str(key): float(value) for key, value in json.loads(file.metadata()["errors"]).items()}
            names = set(file.keys())
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    wanted = {f"{option.key}/{part}" for option in options for part in PARTS}
    return found if wanted <= names and {option.key for option in options} <= set(found) else None


def _build_site(
    model: nn.Module,
    site: Site,
    statistics: Statistics,
    options: Sequence[Option],
    damping: float,
    score: str,
) -> dict[str, Candidate]:
    """All candidates of one site, by the option's key."""
    weight = writer_columns(model, site).detach().double()
    bias = take_snapshot(model, site).bias  # its own, or one added by earlier pruning
    own = torch.zeros(len(weight)) if bias is None else bias
    levels = sorted({option.units for option in options if option.units is not None})
    if score in SELECTIONS:
        width = site.column.width
        ranked = SELECTIONS[score](weight, statistics, width)
        cut = {units: _selected(weight, own, ranked, statistics, units, width) for units in levels}
    else:
        cut = _solved(weight, own, site, statistics, levels, damping)
    uncut = Removal(torch.arange(site.units), weight.float(), own.float().clone())
    made: dict[str, Candidate] = {}
    for option in options:
        removal, error = (uncut, 0.0) if option.units is None else cut[option.units]
        shared = apply.twin_of(option)
        if shared is not None and shared.key in made:
            twin, error = made[shared.key]
            removal = apply.from_twin(site, option, twin, statistics)
        elif option.form != "dense":
            removal, more = apply.apply_option(model, site, option, removal, statistics, damping)
            error = 1 - (1 - min(error, 1.0)) * (1 - min(more, 1.0))
        made[option.key] = (removal, error)
    return made


def _solved(
    weight: Tensor, own: Tensor, site: Site, statistics: Statistics, levels: Sequence[int], damping: float
) -> dict[int, Candidate]:
    """Structured pruning at every level, with the writer refitted."""
    found: dict[int, Candidate] = {}
    width = site.column.width
    for level in obs.solve(weight, statistics.second, statistics.mean, levels, width=width, damping=damping):
        bias = (own + level.shift).float()
        found[len(level.kept)] = (Removal(level.kept, level.weight.float(), bias), level.error)
    return found


def _selected(
    weight: Tensor, own: Tensor, ranked: Tensor, statistics: Statistics, units: int, width: int
) -> Candidate:
    """Baseline: the best `units` units with the writer's own columns, without refitting."""
    kept = scores.best(ranked, units)
    stay = obs.columns(kept, width)
    lost = weight.clone()
    lost[:, stay] = 0
    centered = statistics.second - torch.outer(statistics.mean, statistics.mean)
    # No bias compensates for the mean here, so its loss counts as error too.
    damage = float(((lost @ statistics.second) * lost).sum())
    total = float(((weight @ centered) * weight).sum())
    removal = Removal(kept, weight[:, stay].float(), own.float().clone())
    return removal, damage / total if total > 0 else 0.0


def _taylor(_: Tensor, statistics: Statistics, width: int) -> Tensor:
    if statistics.taylor is None:
        raise CompressError("no first-order scores were collected; calibrate with score = taylor")
    return scores.taylor(statistics.taylor, width)


SELECTIONS: dict[str, Callable[[Tensor, Statistics, int], Tensor]] = {
    "magnitude": lambda weight, _, width: scores.magnitude(weight, width),
    "wanda": lambda weight, found, width: scores.wanda(weight, found.second.diagonal(), width),
    "taylor": _taylor,
}
