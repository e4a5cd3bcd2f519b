"""Before integers are tried, loud channels move from what products read into the weights that read it.

Two places can take a factor for every channel: what a normalization writes, where linear layers alone
read it, and what a site's writer reads, where the rows that make it are linear in it (values of attention,
the ungated half of a gated pair, neurons behind a ReLU). Which these are no graph is asked: every place is
tried with random factors, and the model must answer as before. So a norm of BERT, which the residual sum
reads as well, and neurons behind a GELU stay as they are.

Reference: Xiao et al., "SmoothQuant", arXiv 2211.10438; the mathematics is in `core.smooth`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress import artifacts
from compress.calibration.activation_statistics import real_rows
from compress.core import smooth
from compress.formats import TECHNIQUES
from compress.ir import Document, Site, Slice
from compress.pipeline.job import Job
from compress.sites.equivalence import distance
from compress.sites.modeling import owner
from compress.sites.residual_stream import normalizes
from compress.tasks.loading import Batch, Task

STATISTICS_BATCHES = 16  # batches that say how loud channels are
EQUIVALENCE_SAMPLES = 4  # inputs of a trial
MAX_TEST_FACTOR = 2.0  # factor of a trial, and its inverse
MAX_RESIDUAL_SHARE = (
    1e-3  # of what dividing channels does to the answers, that may be left when readers multiply them
)
SUMMATION_TOLERANCE = 2e-6  # of the largest answer: sums in another order


class SmoothQuantPair(Document):
    """Channels that may be divided where they are made, if those who read them multiply.

    Attributes:
        made: the slices of the tensors that make them, along the channel.
        readers: the weights whose input they are.
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
        """How many there are, each counted once."""
        return self.units * self.made[0].width

    def spread(self, divide: Tensor) -> Tensor:
        """Factors of channels as those of the readers' inputs."""
        return divide.reshape(self.units, 1, -1).expand(-1, self.repeats, -1).flatten()

    def gathered(self, values: Tensor) -> Tensor:
        """[repeats, channels] of one value for every input of the readers."""
        return values.reshape(self.units, self.repeats, -1).movedim(1, 0).flatten(1)


class Smoothing(Document):
    """All channels that were moved."""

    spots: tuple[SmoothQuantPair, ...]


def smooth_model(job: Job) -> tuple[Job, list[str]]:
    """The job on a model that computes the same and is easier to round, and what is worth a note.

    It is the same job where nothing is to gain, and without a move to int8.
    """
    techniques = [TECHNIQUES[move] for move in job.recipe.options.moves]
    if not any(one.per_tensor_input for one in techniques):
        return job, []

    def find() -> Smoothing:
        with job.stages("smooth"):
            # Weights that may end on 4 bits cannot take what those on 8 bits can.
            levels = smooth.FEW if any(one.few_bits for one in techniques) else smooth.LEVELS
            spots = find_pairs(job.task, job.sites, job.calibration[:STATISTICS_BATCHES], levels)
        return Smoothing(spots=tuple(spots))

    found = artifacts.saved(job.work / "smoothing.json", Smoothing, job.key, find)
    if not found.spots:
        return job, ["Smoothing: no channel is so loud that moving it would help integers"]
    model = copy.deepcopy(job.task.model)
    for spot in found.spots:
        apply(model, spot, torch.tensor(spot.divide, dtype=torch.float64))
    inside = sum(spot.readers == (site.writer,) for spot in found.spots for site in job.sites)
    counts = {"normalizations": len(found.spots) - inside, "sites": inside}
    places = " and ".join(f"{count} {name}" for name, count in counts.items() if count)
    return job.on(model), [
        f"Smoothing: for integers, loud channels of {places} moved into the weights that read them; the "
        "model computes the same"
    ]


def find_pairs(
    task: Task, sites: Sequence[Site], batches: Sequence[Batch], levels: int = smooth.LEVELS
) -> list[SmoothQuantPair]:
    """What gains by being moved into weights of so many levels, with its factors; the model is as before.

    Values go first: their rows are among what reads a norm.
    """
    model = copy.deepcopy(task.model)
    few = {name: value[:EQUIVALENCE_SAMPLES] for name, value in batches[0].inputs.items()}
    candidates = [*writer_input_pairs(sites), *normalization_pairs(model, sites, few)]
    generator = torch.Generator().manual_seed(0)
    proven = []
    for spot in candidates:
        random = torch.rand(spot.channels, generator=generator, dtype=torch.float64)
        if is_equivalent(model, spot, MAX_TEST_FACTOR ** (2 * random - 1), few):
            proven.append(spot)
    seen = _channel_statistics(model, proven, batches)
    found = []
    for spot, (largest, second) in zip(proven, seen, strict=True):
        readers = [part for name in spot.readers for part in _columns(model, spot, name)]
        divide = smooth.factors(largest, second, readers, levels)
        if not bool((divide == 1).all()) and is_equivalent(model, spot, divide, few):
            apply(model, spot, divide)
            found.append(spot.model_copy(update={"divide": tuple(divide.tolist())}))
    return found


def writer_input_pairs(sites: Sequence[Site]) -> Iterator[SmoothQuantPair]:
    """What writers read, for every set of rows that may make it alone."""
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
    """What normalizations write and linear layers of sites read, the very tensor."""
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
    model: nn.Module, spot: SmoothQuantPair, divide: Tensor, inputs: Mapping[str, Tensor]
) -> bool:
    """Whether readers make up for channels that are divided; the model is left as it was.

    Answers may differ by what float sums in another order do, and by a small part of what the division
    alone does to them: behind a GELU that reads small numbers, only that part tells.
    """
    before = model(**inputs)
    with _restored(model, spot):
        divide_producers(model, spot, divide)
        alone = distance(model(**inputs), before)
        multiply_readers(model, spot, divide)
        return distance(model(**inputs), before) <= MAX_RESIDUAL_SHARE * alone + SUMMATION_TOLERANCE


@torch.no_grad()
def divide_producers(model: nn.Module, spot: SmoothQuantPair, divide: Tensor) -> None:
    """Divide channels where they are made, in place."""
    for part in spot.made:
        value = model.get_parameter(part.tensor).narrow(part.dim, part.start, spot.channels)
        smooth.move(divide, [value.movedim(part.dim, 0)], [])


@torch.no_grad()
def multiply_readers(model: nn.Module, spot: SmoothQuantPair, divide: Tensor) -> None:
    """Multiply channels where they are read, in place."""
    smooth.move(spot.spread(divide), [], [_reader(model, spot, name) for name in spot.readers])


def apply(model: nn.Module, spot: SmoothQuantPair, divide: Tensor) -> None:
    """Move channels, in place."""
    divide_producers(model, spot, divide)
    multiply_readers(model, spot, divide)


@contextmanager
def _restored(model: nn.Module, spot: SmoothQuantPair) -> Iterator[None]:
    """The tensors of a spot come out as they went in."""
    names = [*(part.tensor for part in spot.made), *spot.readers]
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).detach().copy_(value)


def _channel_statistics(
    model: nn.Module, spots: Sequence[SmoothQuantPair], batches: Sequence[Batch]
) -> list[tuple[Tensor, Tensor]]:
    """Largest magnitude and mean square of every spot's channels, over all real rows."""
    sums: list[list[Tensor]] = [[] for _ in spots]
    current: list[Batch] = []

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = real_rows(arguments[0], current[-1]).double()
            sums[index].append(torch.stack([rows.abs().amax(0), rows.square().mean(0)]))

        return before

    handles = [
        model.get_submodule(owner(spot.readers[0])).register_forward_pre_hook(hook(index))
        for index, spot in enumerate(spots)
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
    for spot, parts in zip(spots, sums, strict=True):
        each = torch.stack(parts)
        largest, second = each[:, 0].amax(0), each[:, 1].mean(0)
        found.append((spot.gathered(largest).amax(0), spot.gathered(second).mean(0)))
    return found


def _reader(model: nn.Module, spot: SmoothQuantPair, name: str) -> Tensor:
    """A reader's weight as [out, in], a view of what is stored."""
    weight = model.get_parameter(name)
    return weight.T if spot.across else weight


def _columns(model: nn.Module, spot: SmoothQuantPair, name: str) -> Iterator[Tensor]:
    """A reader's weight as matrices [out, channels], one for each repeat of them."""
    weight = _reader(model, spot, name).detach()
    apart = weight.reshape(len(weight), spot.units, spot.repeats, -1)
    for repeat in range(spot.repeats):
        yield apart[:, :, repeat].flatten(1)
