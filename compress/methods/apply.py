"""What besides removing units may be done to a site: the forms that a target can run, and their weights.

A form says how the products of a site run: in blocks of zeros, with a low-rank part, in another
precision. It is laid over whatever structure was kept, so every form may stand at every number of units
whose shapes it fits. Errors are relative, as those of structure are; readers are matched about zero, since
what comes after them is not linear, the writer about its mean, which its bias takes up.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.calibration.activation_statistics import Statistics
from compress.core import block, factorization, fakequant, gptq, lowrank, nm, obs
from compress.core.fakequant import PRECISIONS, Quantized
from compress.core.support import Block, Layer, prepare
from compress.errors import CompressError
from compress.export.backends.backend import Capabilities
from compress.ir import Option, Site
from compress.sites import permutation, prune
from compress.sites.prune import Removal

RANKS = (0.25, 0.125)  # of the hidden width
MIXED = 0.0625  # rank beside the sparsest blocks, of the hidden width
DYNAMIC, STATIC = "int8-dynamic", "int8-static"
REACH = 16.0  # largest input that fp8 tells apart, in root mean squares of the input's largest feature
LEVELS = 8  # numbers of units at which a site is offered in a form


@dataclass(frozen=True)
class Shaped:
    """One matrix in a form: [out, in] values, what its bias gains, its error, and what it is made of."""

    values: Tensor
    shift: Tensor
    error: float
    factors: tuple[Tensor, Tensor] | None = None
    codes: Quantized | None = None


def of(
    site: Site,
    moves: Sequence[str],
    runtime: Capabilities,
    blocks: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The forms in which a site is offered on a runtime; `blocks` are the patterns that were found to pay."""
    if blocks is None:
        blocks = runtime.block_patterns
    if _shared(site):
        return ()
    hidden = next(m.out for m in site.matmuls if m.weight == site.writer)
    ranks = [max(1, round(share * hidden)) for share in (*RANKS, MIXED)]
    by_move = {
        "structure": (),
        "width": (),
        "int8": (DYNAMIC,),
        "int8-static": (STATIC,),
        "int4": ("int4",),
        "fp8": ("fp8",),
        "block": tuple(blocks),
        "2:4": ("2:4",),
        "lowrank": tuple(f"rank:{rank}" for rank in ranks[: len(RANKS)]),
    }
    offered = [Option.of(form, None) for move in moves for form in by_move[move]]
    if {"block", "lowrank"} <= set(moves) and blocks and runtime.pairs_blocks_with_rank:
        sparsest = min(blocks, key=lambda pattern: Option(pattern=pattern).density)
        offered.append(Option.of(f"{sparsest}+rank:{ranks[-1]}", None))
    # Codes stand for [out, in] weights; a matrix that is stored the other way round keeps its floats.
    across = site.column.dim == 0
    return tuple(option.form for option in offered if runtime.executes(option, transposed=across))


def levels(site: Site, form: str, units: Sequence[int], runtime: Capabilities) -> list[int]:
    """Units at which a site is offered in a form, at most `LEVELS`, the most first.

    They are those that structure offers, moved to where the form fits.
    """
    option = Option.of(form, None)
    steps = runtime.multiples(option)
    fitting = [count for count in range(site.units, 0, -1) if _fits(site, option, steps, count)]
    nearest = {min(fitting, key=lambda fit: abs(fit - count)) for count in units if count and fitting}
    ordered = sorted(nearest, reverse=True)
    if len(ordered) <= LEVELS:
        return ordered
    picked = {round(k * (len(ordered) - 1) / (LEVELS - 1)) for k in range(LEVELS)}
    return [ordered[index] for index in sorted(picked)]


def treat(
    model: nn.Module,
    site: Site,
    option: Option,
    removal: Removal,
    statistics: Statistics,
    damping: float,
) -> tuple[Removal, float]:
    """A structural removal with its matrices in the option's form, and the error that this adds.

    Args:
        model: the dense model.
        site: where.
        option: the form; its units are those of the removal.
        removal: with the writer's weight and bias in it.
        statistics: of the site, with those of the readers.
        damping: relative to each diagonal entry of a second moment.

    Raises:
        CompressError: the statistics say nothing about the readers.
    """
    if statistics.reader is None or removal.weight is None or removal.bias is None:
        raise CompressError(f"{site.name}: no statistics of its readers; calibrate with readers = true")
    if option.precision == STATIC:
        twin = option.model_copy(update={"precision": DYNAMIC})
        rounded, error = treat(model, site, twin, removal, statistics, damping)
        return static(site, rounded, statistics), error
    stay = obs.columns(removal.kept, site.column.width)
    moments = statistics.second[stay][:, stay], statistics.mean[stay]
    felt = statistics.saliency.get(site.writer)
    felt = None if felt is None else felt[:, :, stay]
    writer, order = _ordered(site, option, removal.weight.double(), *moments, damping, felt)
    found = {site.writer: writer}
    readers: dict[str, Tensor] = {}
    nothing = torch.zeros(len(statistics.reader), dtype=torch.float64)
    for name in prune.readers(site):
        stored = prune.kept_reader_weight(model, site, name, removal.kept)
        across = next(part.dim for part in site.slices if part.tensor == name) == 1
        weight = (stored.T if across else stored).double()
        felt = statistics.saliency.get(name)
        felt = None if felt is None else felt[:, prune.kept_positions(model, site, name, removal.kept)]
        found[name] = shape(option, weight, statistics.reader, nothing, damping, felt)
        values = found[name].values
        readers[name] = (values.T if across else values).to(stored.dtype)
    mean = sum(found[name].error for name in readers) / len(readers)
    if order is not None:
        readers = permutation.permute_readers(model, site, removal.kept, order, readers)
    return (
        Removal(
            removal.kept.clone(),  # a file stores no tensor twice under two names
            writer.values.to(removal.weight.dtype),
            removal.bias + writer.shift.to(removal.bias.dtype),
            readers,
            option.form,
            {name: one.factors for name, one in found.items() if one.factors is not None},
            {name: one.codes for name, one in found.items() if one.codes is not None},
        ),
        1 - (1 - min(writer.error, 1.0)) * (1 - min(mean, 1.0)),
    )


def _ordered(
    site: Site,
    option: Option,
    weight: Tensor,
    second: Tensor,
    mean: Tensor,
    damping: float,
    felt: Tensor | None,
) -> tuple[Shaped, Tensor | None]:
    """The writer's kept columns in the option's form, and the new order that they are in, if any.

    2:4 depends on which columns are neighbors; an order is taken only where less is lost in it.
    """
    plain = shape(option, weight, second, mean, damping, felt)
    if option.form != "2:4" or not site.channels:
        return plain, None
    layer = prepare(weight, second, mean, damping)
    columns = permutation.find_order(
        site, layer.signal.square() / factorization.invert(layer.damped).diagonal()
    )
    moved = shape(option, weight[:, columns], second[columns][:, columns], mean[columns], damping)
    return (moved, columns) if moved.error < plain.error else (plain, None)


def static(site: Site, removal: Removal, statistics: Statistics) -> Removal:
    """A removal in int8-dynamic as int8-static: the same codes, for inputs whose ranges are fixed.

    Raises:
        CompressError: the statistics hold no ranges.
    """
    if statistics.range is None or statistics.reader_span is None:
        raise CompressError(f"{site.name}: no ranges of its inputs; calibrate with spans = true")
    own = statistics.range.of(obs.columns(removal.kept, site.column.width))
    twin = copy.deepcopy(removal)  # a file stores no tensor twice under two names
    codes = {
        name: fakequant.packed(
            PRECISIONS[STATIC],
            found.codes,
            found.step,
            own if name == site.writer else statistics.reader_span,
        )
        for name, found in twin.codes.items()
    }
    option = Option.of(removal.form, None).model_copy(update={"precision": STATIC})
    return replace(twin, form=option.form, codes=codes)


def shape(
    option: Option,
    weight: Tensor,
    second: Tensor,
    mean: Tensor,
    damping: float,
    felt: Tensor | None = None,
) -> Shaped:
    """One matrix in the option's form.

    Args:
        option: pattern, rank and precision; its units are not read.
        weight: [out, in] float64.
        second: [in, in] `E[x x^T]` of its inputs, not centered.
        mean: [in] `E[x]`; zeros where the bias must not change.
        damping: relative to each diagonal entry.
        felt: [samples, rows, columns] effects of its tiles, where blocks are ranked by them (`saliency`).
    """
    made = Shaped(weight, torch.zeros(len(weight), dtype=weight.dtype), 0.0)
    if option.rank:
        made = _split(option, prepare(weight, second, mean, damping))
    elif option.pattern == "2:4":
        sparse = nm.solve(prepare(weight, second, mean, damping))
        made = Shaped(sparse.values, sparse.shift, sparse.error)
    elif option.pattern != "dense":
        if felt is None:
            cut = block.solve(weight, second, mean, option.block, option.density, damping=damping)
        else:
            kept = block.choose(_ranked(option, weight, felt), option.density)
            cut = block.fit(weight, second, mean, option.block, kept, damping=damping)
        made = Shaped(cut.values, cut.shift, cut.error)
    if option.precision != "fp32":
        precision = PRECISIONS[option.precision]
        span = _span(second) if option.precision == "fp8" else None
        rounded = gptq.quantize(made.values, second, mean, precision, span=span, damping=damping)
        made = Shaped(
            rounded.quantized.weight().double(),
            made.shift + rounded.shift,
            1 - (1 - min(made.error, 1.0)) * (1 - min(rounded.error, 1.0)),
            codes=rounded.quantized,
        )
    return made


def _ranked(option: Option, weight: Tensor, felt: Tensor) -> Tensor:
    """The saliency of the option's blocks, [groups, blocks], from the effects of tiles of this weight."""
    (rows, columns), (out, inner) = option.block, weight.shape
    return block.pooled(felt, (rows * felt.shape[1] // out, columns * felt.shape[2] // inner))


def _split(option: Option, layer: Layer) -> Shaped:
    """A low-rank matrix, or blocks and a low-rank part that were found together."""
    if option.pattern == "dense":
        split = lowrank.factor(layer, option.rank)
    else:
        split = lowrank.decompose(layer, Block(*option.block, option.density), option.rank)
    values = split.values + split.left @ split.right
    return Shaped(values, split.shift, split.error, (split.left.float(), split.right.float()))


def _span(second: Tensor) -> tuple[float, float]:
    """A range of inputs for fp8, far enough that nothing is clipped: small numbers lose nothing by it."""
    most = REACH * float(second.diagonal().max().clamp(min=0).sqrt())
    return -most, most


def _fits(site: Site, option: Option, steps: tuple[int, int], units: int) -> bool:
    """Whether every product of the site, at these units, is of the multiples and keeps something."""
    rows, columns = steps
    least = columns / 2 / option.density  # of inputs: half a block is rounded to a whole one
    shapes = [matmul.features(units) for matmul in site.matmuls]
    return all(out % rows == 0 and inner % columns == 0 and inner >= least for out, inner in shapes)


def _shared(site: Site) -> bool:
    """Whether a matrix of the site has rows that no unit owns, which a form would change as well."""
    owned: dict[str, int] = {}
    for part in site.slices:
        owned[part.tensor] = owned.get(part.tensor, 0) + part.width
    return any(matmul.out_per_unit not in (0, owned[matmul.weight]) for matmul in site.matmuls)
