"""Options of a site besides removing units, and the weights of the site under one of them.

An option adds a sparsity pattern, a low-rank part or a number format to the products of a site, at any number
of kept units. Errors are relative to the dense output. Readers are fitted about zero, since a nonlinearity
follows them; the writer is fitted about its mean, which its bias compensates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress import formats
from compress.calibration.activation_statistics import Statistics
from compress.core import obs
from compress.errors import CompressError
from compress.export.backends.backend import Capabilities
from compress.ir import Option, Site
from compress.methods.move import InputStatistics, Move, WeightUnderOption
from compress.sites import permutation, prune
from compress.sites.prune import Removal

MAX_LEVELS = 8  # numbers of units per option of a site


def offered_forms(
    site: Site,
    moves: Sequence[str],
    runtime: Capabilities,
    blocks: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The option strings of a site on a runtime; `blocks` are the block patterns that are faster there."""
    if blocks is None:
        blocks = runtime.block_patterns
    if _has_shared_rows(site):
        return ()
    asked = [found for move in moves if (found := formats.implementation(move)) is not None]
    options = [option for move in asked for option in move.options(site, runtime, blocks)]
    options += [option for move in asked for option in move.joint_options(site, runtime, blocks, moves)]
    # Codes are [out, in]; a matrix that is stored as [in, out] cannot be quantized.
    transposed = site.column.dim == 0
    return tuple(option.form for option in options if runtime.executes(option, transposed=transposed))


def levels(site: Site, form: str, units: Sequence[int], runtime: Capabilities) -> list[int]:
    """Numbers of units at which an option is offered, at most `MAX_LEVELS`, in descending order.

    These are the levels of structured pruning, moved to the nearest number of units that fits the option.
    """
    option = Option.of(form, None)
    steps = runtime.multiples(option)
    fitting = [count for count in range(site.units, 0, -1) if _fits(site, option, steps, count)]
    nearest = {min(fitting, key=lambda fit: abs(fit - count)) for count in units if count and fitting}
    ordered = sorted(nearest, reverse=True)
    if len(ordered) <= MAX_LEVELS:
        return ordered
    picked = {round(k * (len(ordered) - 1) / (MAX_LEVELS - 1)) for k in range(MAX_LEVELS)}
    return [ordered[index] for index in sorted(picked)]


def apply_option(
    model: nn.Module,
    site: Site,
    option: Option,
    removal: Removal,
    statistics: Statistics,
    damping: float,
) -> tuple[Removal, float]:
    """A structured removal with the option applied to its matrices, and the error that this adds.

    Args:
        model: the dense model.
        site: the site to compress.
        option: pattern, rank and number format; the units are those of `removal`.
        removal: with the weight and bias of the writer.
        statistics: of the site, including its readers.
        damping: relative to each diagonal entry of a second moment.

    Raises:
        CompressError: the statistics do not include the readers.
    """
    if statistics.reader is None or removal.weight is None or removal.bias is None:
        raise CompressError(f"{site.name}: no statistics of its readers; calibrate with readers = true")
    twin = twin_of(option)
    if twin is not None:
        rounded, error = apply_option(model, site, twin, removal, statistics, damping)
        return from_twin(site, option, rounded, statistics), error
    stay = obs.columns(removal.kept, site.column.width)
    tiles = statistics.saliency.get(site.writer)
    inputs = InputStatistics(
        statistics.second[stay][:, stay],
        statistics.mean[stay],
        damping,
        None if tiles is None else tiles[:, :, stay],
    )
    writer, order = _solve_writer(site, option, removal.weight.double(), inputs)
    found = {site.writer: writer}
    readers: dict[str, Tensor] = {}
    nothing = torch.zeros(len(statistics.reader), dtype=torch.float64)
    for name in prune.readers(site):
        stored = prune.kept_reader_weight(model, site, name, removal.kept)
        across = next(part.dim for part in site.slices if part.tensor == name) == 1
        weight = (stored.T if across else stored).double()
        tiles = statistics.saliency.get(name)
        if tiles is not None:
            tiles = tiles[:, prune.kept_positions(model, site, name, removal.kept)]
        found[name] = solve(option, weight, InputStatistics(statistics.reader, nothing, damping, tiles))
        values = found[name].values
        readers[name] = (values.T if across else values).to(stored.dtype)
    mean = sum(found[name].error for name in readers) / len(readers)
    if order is not None:
        readers = permutation.permute_readers(model, site, removal.kept, order, readers)
    return (
        Removal(
            removal.kept.clone(),  # safetensors does not store shared tensors
            writer.values.to(removal.weight.dtype),
            removal.bias + writer.shift.to(removal.bias.dtype),
            readers,
            option.form,
            {name: one.factors for name, one in found.items() if one.factors is not None},
            {name: one.codes for name, one in found.items() if one.codes is not None},
        ),
        1 - (1 - min(writer.error, 1.0)) * (1 - min(mean, 1.0)),
    )


def _solve_writer(
    site: Site, option: Option, weight: Tensor, inputs: InputStatistics
) -> tuple[WeightUnderOption, Tensor | None]:
    """The writer's kept columns under the option, and their new order if one has a lower error, else None."""
    plain = solve(option, weight, inputs)
    orders = [
        order
        for move in formats.implementations()
        if move.applies(option) and (order := move.column_order(option, site, weight, inputs)) is not None
    ]
    best, columns = plain, None
    for order in orders:
        ordered = InputStatistics(inputs.second[order][:, order], inputs.mean[order], inputs.damping)
        moved = solve(option, weight[:, order], ordered)
        if moved.error < best.error:
            best, columns = moved, order
    return best, columns


def from_twin(site: Site, option: Option, twin: Removal, statistics: Statistics) -> Removal:
    """The site under an option that shares the codes of `twin` (see `twin_of`)."""
    made: Removal = formats.move_of_format(option.precision).from_twin(site, twin, statistics)
    return made


def twin_of(option: Option) -> Option | None:
    """The option in the number format with the same codes, None if there is none."""
    shared = option.number_format
    return option.model_copy(update={"precision": shared.codes_of}) if shared and shared.codes_of else None


def solve(option: Option, weight: Tensor, inputs: InputStatistics) -> WeightUnderOption:
    """One matrix under an option, each part solved by its move.

    Args:
        option: pattern, rank and number format; its units are ignored.
        weight: [out, in] float64.
        inputs: statistics of the inputs.
    """
    made = WeightUnderOption.dense(weight)
    for move in _in_order(option):
        made = move.solve(option, made, inputs)
    return made


def _in_order(option: Option) -> list[Move]:
    """The moves of an option: sparsity and low rank first, then quantization."""
    own = [move for move in formats.implementations() if move.applies(option)]
    rounding = None if option.number_format is None else formats.move_of_format(option.precision)
    return sorted(own, key=lambda move: move is rounding)


def _fits(site: Site, option: Option, steps: tuple[int, int], units: int) -> bool:
    """Whether every product of the site, at these units, has the required multiples and keeps a block."""
    rows, columns = steps
    least = columns / 2 / option.density  # inputs; half a block is rounded up to one
    shapes = [matmul.features(units) for matmul in site.matmuls]
    return all(out % rows == 0 and inner % columns == 0 and inner >= least for out, inner in shapes)


def _has_shared_rows(site: Site) -> bool:
    """Whether a matrix of the site has rows outside of its units, which an option would change too."""
    owned: dict[str, int] = {}
    for part in site.slices:
        owned[part.tensor] = owned.get(part.tensor, 0) + part.width
    return any(matmul.out_per_unit not in (0, owned[matmul.weight]) for matmul in site.matmuls)
