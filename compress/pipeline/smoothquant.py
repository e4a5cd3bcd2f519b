"""SmoothQuant before quantization: shift activation outliers into the weights that read them.

Channels can be scaled in two places: at the output of a normalization that only linear layers read, and at
the input of a site's writer, if the rows that produce it are linear in it (values of attention, the ungated
half of a gated pair, neurons behind a ReLU). Candidates are verified numerically: every pair is scaled by
random factors, and the outputs of the model must not change. So a norm of BERT that the residual sum reads as
well, and neurons behind a GELU, are left out.

Reference: Xiao et al., "SmoothQuant", arXiv 2211.10438; the mathematics is in `core.smooth`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress import artifacts, formats
from compress.calibration.activation_statistics import real_rows
from compress.core import smooth
from compress.ir import Document, Site, Slice
from compress.pipeline.job import Job
from compress.sites.equivalence import distance
from compress.sites.modeling import owner
from compress.sites.residual_stream import normalizes
from compress.tasks.loading import Batch, Task

STATISTICS_BATCHES = 16  # batches for the channel statistics
EQUIVALENCE_SAMPLES = 4  # samples of the equivalence test
MAX_TEST_FACTOR = 2.0  # largest factor of the equivalence test; the smallest is its inverse
MAX_RESIDUAL_SHARE = 1e-3  # of the change by dividing alone, after readers multiply
SUMMATION_TOLERANCE = 2e-6  # of the largest output: summation order


class SmoothQuantPair(Document):
    """Channels that can be divided at their producers if their readers multiply by the same factors.

    Attributes:
        made: the slices of the producing tensors, along the channel.
        readers: the weights that read them.
        across: the readers hold their inputs along dimension 0.
        units: of the slices.
        repeats: how often each unit's channels lie side by side in the readers' input (grouped queries).
        divide: the factor of every channel.
    """

    made: tuple[Slice, ...]
    readers: tuple[str, ...]
    across: bool = False
    units: int
    repeats: int = 1
    divide: tuple[float, ...] = ()

    @property
    def channels(self) -> int:
        """The number of channels, without repeats."""
        return self.units * self.made[0].width

    def spread(self, divide: Tensor) -> Tensor:
        """Expand factors [channels] to the inputs of the readers."""
        return divide.reshape(self.units, 1, -1).expand(-1, self.repeats, -1).flatten()

    def gathered(self, values: Tensor) -> Tensor:
        """Reshape values of the readers' inputs to [repeats, channels]."""
        return values.reshape(self.units, self.repeats, -1).movedim(1, 0).flatten(1)


class Smoothing(Document):
    """All pairs that were scaled (smoothing.json)."""

    spots: tuple[SmoothQuantPair, ...]


def smooth_model(job: Job) -> tuple[Job, list[str]]:
    """The job on an equivalent model with smaller activation outliers, and notes for the report.

    Without an int8 move, or if no channel gains, the job is returned unchanged.
    """
    brought = [found for move in job.recipe.options.moves for found in formats.MOVES[move].formats]
    if not any(found.reads_whole_rows for found in brought):
        return job, []

    def find() -> Smoothing:
        with job.stages("smooth"):
            # Weights of few bits leave less room for outliers, so the migration strength is smaller.
            levels = smooth.FEW if min(found.bits for found in brought) < 8 else smooth.LEVELS
            pairs = find_pairs(job.task, job.sites, job.calibration[:STATISTICS_BATCHES], levels)
        return Smoothing(spots=tuple(pairs))

    found = artifacts.saved(job.work / "smoothing.json", Smoothing, job.key, find)
    if not found.spots:
        return job, ["SmoothQuant: no activation outliers that scaling would reduce"]
    model = copy.deepcopy(job.task.model)
    for pair in found.spots:
        apply(model, pair, torch.tensor(pair.divide, dtype=torch.float64))
    inside = sum(pair.readers == (site.writer,) for pair in found.spots for site in job.sites)
    counts = {"normalizations": len(found.spots) - inside, "sites": inside}
    places = " and ".join(f"{count} {name}" for name, count in counts.items() if count)
    return job.on(model), [
        f"SmoothQuant: activation outliers of {places} were shifted into the weights that read them; the "
        "model computes the same function"
    ]


def find_pairs(
    task: Task, sites: Sequence[Site], batches: Sequence[Batch], levels: int = smooth.LEVELS
) -> list[SmoothQuantPair]:
    """The pairs that gain by scaling, with their factors, for weights of so many levels.

    Writer inputs come first, since the rows that produce them are among the readers of a norm. The task's
    model is not changed.
    """
    model = copy.deepcopy(task.model)
    few = {name: value[:EQUIVALENCE_SAMPLES] for name, value in batches[0].inputs.items()}
    candidates = [*writer_input_pairs(sites), *normalization_pairs(model, sites, few)]
    generator = torch.Generator().manual_seed(0)
    verified = []
    for pair in candidates:
        random = torch.rand(pair.channels, generator=generator, dtype=torch.float64)
        if is_equivalent(model, pair, MAX_TEST_FACTOR ** (2 * random - 1), few):
            verified.append(pair)
    seen = _channel_statistics(model, verified, batches)
    found = []
    for pair, (largest, second) in zip(verified, seen, strict=True):
        readers = [part for name in pair.readers for part in _columns(model, pair, name)]
        divide = smooth.factors(largest, second, readers, levels)
        if not bool((divide == 1).all()) and is_equivalent(model, pair, divide, few):
            apply(model, pair, divide)
            found.append(pair.model_copy(update={"divide": tuple(divide.tolist())}))
    return found


def writer_input_pairs(sites: Sequence[Site]) -> Iterator[SmoothQuantPair]:
    """Candidate pairs at the inputs of writers, one for every set of rows that may produce them alone."""
    for site in sites:
        sets: dict[tuple[str, int, int], list[Slice]] = {}
        for part in site.channels:
            sets.setdefault((owner(part.tensor), part.start, part.width), []).append(part)
        for made in sets.values():
            repeats = site.column.width // made[0].width
            yield SmoothQuantPair(
                made=tuple(made),
                readers=(site.writer,),
                across=site.column.dim == 0,
                units=site.units,
                repeats=repeats,
            )


def normalization_pairs(
    model: nn.Module, sites: Sequence[Site], inputs: Mapping[str, Tensor]
) -> Iterator[SmoothQuantPair]:
    """Candidate pairs at normalizations whose output tensor is read by linear layers of sites."""
    written: dict[str, Tensor] = {}
    readers: dict[str, list[str]] = {}

    def wrote(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):
                written[name] = output

        return hook

    def reads(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[object, ...]) -> None:
            for norm, value in written.items():
                if arguments and arguments[0] is value and name not in readers.setdefault(norm, []):
                    readers[norm].append(name)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(reads(f"{name}.weight")))
        elif getattr(module, "weight", None) is not None and normalizes(module) is not None:
            handles.append(module.register_forward_hook(wrote(name)))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    own = {matmul.weight for site in sites for matmul in site.matmuls}
    for norm, names in readers.items():
        if own & set(names):
            parts = [name for name, _ in model.get_submodule(norm).named_parameters()]
            made = tuple(Slice(tensor=f"{norm}.{part}", dim=0, width=1) for part in parts)
            yield SmoothQuantPair(
                made=made, readers=tuple(names), units=len(model.get_parameter(f"{norm}.weight"))
            )


@torch.no_grad()
def is_equivalent(
    model: nn.Module, pair: SmoothQuantPair, divide: Tensor, inputs: Mapping[str, Tensor]
) -> bool:
    """Whether the outputs stay equal if producers divide and readers multiply; the model is restored.

    Allowed are rounding by summation order and a small part of the change that division alone causes:
    behind a GELU with small inputs only the latter shows the difference.
    """
    before = model(**inputs)
    with _restored(model, pair):
        divide_producers(model, pair, divide)
        alone = distance(model(**inputs), before)
        multiply_readers(model, pair, divide)
        return distance(model(**inputs), before) <= MAX_RESIDUAL_SHARE * alone + SUMMATION_TOLERANCE


@torch.no_grad()
def divide_producers(model: nn.Module, pair: SmoothQuantPair, divide: Tensor) -> None:
    """Divide channels at their producers, in place."""
    for part in pair.made:
        value = model.get_parameter(part.tensor).narrow(part.dim, part.start, pair.channels)
        smooth.move(divide, [value.movedim(part.dim, 0)], [])


@torch.no_grad()
def multiply_readers(model: nn.Module, pair: SmoothQuantPair, divide: Tensor) -> None:
    """Multiply channels at their readers, in place."""
    smooth.move(pair.spread(divide), [], [_reader(model, pair, name) for name in pair.readers])


def apply(model: nn.Module, pair: SmoothQuantPair, divide: Tensor) -> None:
    """Scale producers and readers, in place."""
    divide_producers(model, pair, divide)
    multiply_readers(model, pair, divide)


@contextmanager
def _restored(model: nn.Module, pair: SmoothQuantPair) -> Iterator[None]:
    """Restore the tensors of a pair on exit."""
    names = [*(part.tensor for part in pair.made), *pair.readers]
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).detach().copy_(value)


def _channel_statistics(
    model: nn.Module, pairs: Sequence[SmoothQuantPair], batches: Sequence[Batch]
) -> list[tuple[Tensor, Tensor]]:
    """Largest magnitude and mean square of the channels of every pair, over all real rows."""
    sums: list[list[Tensor]] = [[] for _ in pairs]
    current: list[Batch] = []

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = real_rows(arguments[0], current[-1]).double()
            sums[index].append(torch.stack([rows.abs().amax(0), rows.square().mean(0)]))

        return before

    handles = [
        model.get_submodule(owner(pair.readers[0])).register_forward_pre_hook(hook(index))
        for index, pair in enumerate(pairs)
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                current[:] = [batch]
                model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for pair, parts in zip(pairs, sums, strict=True):
        each = torch.stack(parts)
        largest, second = each[:, 0].amax(0), each[:, 1].mean(0)
        found.append((pair.gathered(largest).amax(0), pair.gathered(second).mean(0)))
    return found


def _reader(model: nn.Module, pair: SmoothQuantPair, name: str) -> Tensor:
    """A reader's weight as [out, in], a view of what is stored."""
    weight = model.get_parameter(name)
    return weight.T if pair.across else weight


def _columns(model: nn.Module, pair: SmoothQuantPair, name: str) -> Iterator[Tensor]:
    """A reader's weight as matrices [out, channels], one for each repeat of them."""
    weight = _reader(model, pair, name).detach()
    apart = weight.reshape(len(weight), pair.units, pair.repeats, -1)
    for repeat in range(pair.repeats):
        yield apart[:, :, repeat].flatten(1)
