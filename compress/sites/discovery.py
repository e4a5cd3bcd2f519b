"""nn.Module -> Sites: finds the places that can be compressed in the traced program.

`trace` splits the program into regions between linear products, `grouping` finds the units of each,
`kinds` names the kind, `equivalence` checks that the smaller module computes what the masked one does. A
model that cannot be traced is searched by module names instead (`by_name`).
"""

from collections.abc import Iterator, Sequence

import torch
from pydantic import model_validator
from torch import Tensor, nn

from compress.errors import CompressError
from compress.ir import Document, Matmul, Site, Slice
from compress.sites.by_name import named_sites
from compress.sites.equivalence import Call, NotEquivalentError, common_module, verify, with_prefix
from compress.sites.grouping import NotASiteError, find_layout, structure_key
from compress.sites.kinds import known, match
from compress.sites.kinds.kind import Kind
from compress.sites.kinds.layout import Layout
from compress.sites.trace import Linear, Program, Region, evaluating, plain_attention, without_cache


class Skipped(Document):
    """A place that looks like a site and is none, and why."""

    place: str
    reason: str


class Sites(Document):
    """The sites of a model; `fallback` is why it could not be traced, if so."""

    sites: tuple[Site, ...]
    fallback: str | None = None
    skipped: tuple[Skipped, ...] = ()

    @model_validator(mode="after")
    def _kinds_are_known(self) -> "Sites":
        for site in self.sites:
            known(site.kind)
        return self


def find_sites(model: nn.Module, example: dict[str, Tensor]) -> Sites:
    """The sites of `model`, of every kind that it holds, each checked on a copy; the model is untouched.

    Args:
        model: any module; on the CPU, in float32.
        example: keyword arguments of one valid call, without padding.

    Raises:
        CompressError: the model does not run on the example.
    """
    skipped: list[Skipped] = []
    with evaluating(model), torch.no_grad():
        example = without_cache(model, example)
        batch = next((value.shape[0] for value in example.values() if value.ndim), 1)
        fallback = None
        try:
            program = Program(model, example)
        except Exception as error:
            # Tracing runs arbitrary code, which can raise anything.
            _run(model, example)
            lines = str(error).strip().splitlines()
            fallback = (
                f"torch.export cannot trace {type(model).__name__} ({type(error).__name__}: "
                f"{lines[0] if lines else 'no message'}), so sites were looked up by module names"
            )
            found = named_sites(model, example, batch)
        else:
            found = _sites_of_program(model, program, batch, skipped)
        found = _without_overlaps(found, skipped)
        sites = _verified(model, example, found, skipped)
    return Sites(sites=tuple(_named_uniquely(sites)), fallback=fallback, skipped=tuple(skipped))


def _sites_of_program(
    model: nn.Module, program: Program, batch: int, skipped: list[Skipped]
) -> list[tuple[Site, str]]:
    """Sites without counts and drop, each with the key of its structure."""
    rows = max((linear.rows for linear in program.linears), default=1)
    layouts: dict[str, Layout | NotASiteError] = {}
    found: list[tuple[Site, str]] = []
    for region in program.regions():
        names = [*(producer.weight for producer in region.producers), region.writer.weight]
        place = common_module(names) or common_module(names[-1:])
        key = structure_key(region)
        if key not in layouts:
            try:
                layouts[key] = find_layout(program, region)
            except NotASiteError as refusal:
                layouts[key] = refusal
            except Exception as error:
                # Random values in arbitrary code can raise anything; only this region is skipped.
                layouts[key] = NotASiteError(f"it cannot be probed: {error}")
        units = layouts[key]
        if isinstance(units, NotASiteError):
            if region.attention is not None:
                skipped.append(Skipped(place=place, reason=str(units)))
            continue
        kind = match(units)
        if kind is None:
            continue
        reason = _reason_to_skip(model, program, region, units)
        if not reason and batch == region.writer.rows < rows:
            reason = "it computes one row for each input, so pruning it saves no time"
        if reason:
            skipped.append(Skipped(place=place, reason=reason))
            continue
        found.append((_site(program, region, kind, units, batch), key))
    return found


def _reason_to_skip(model: nn.Module, program: Program, region: Region, units: Layout) -> str:
    """Why the weights of a region may not be cut although it falls into units."""
    if region.leak is not None:
        return f"what it computes is also read outside of it, by {region.leak.name}"
    linears = (*region.producers, region.writer)
    if any(linear.node.meta["val"].numel() == 0 for linear in linears):
        return "it computes nothing"
    writer = region.writer
    if writer.start or writer.out != model.get_parameter(writer.weight).shape[writer.dim]:
        return f"only a part of {writer.weight} is the writer"
    owned = [name for linear in linears for name in (linear.weight, linear.bias) if name]
    owned += [program.names[region.outside[run.place]] for run in units.runs if run.outside]
    inside = {*region.nodes, *(linear.node for linear in linears)}
    for name in dict.fromkeys(owned):
        value = model.get_parameter(name)
        same = [n for n, v in model.named_parameters(remove_duplicate=False) if v is value]
        if len(same) > 1:
            return f"{same[0]} and {same[1]} are one tensor"
        readers = program.readers(name) - inside
        rows = {row for linear in linears for row in _rows(linear, name)}
        # Another product may read other rows of the same matrix.
        beside = {o.node for o in program.linears if name in (o.weight, o.bias)}
        beside -= {o.node for o in program.linears if not rows.isdisjoint(_rows(o, name))}
        if readers - beside:
            return f"{name} is used {len(readers - beside) + 1} times in one run"
    return ""


def _rows(linear: Linear, name: str) -> range:
    """Indices of the stored tensor `name` that the product's output features have."""
    if name == linear.weight:
        return range(linear.start, linear.start + linear.out)
    if name == linear.bias:
        return range(linear.bias_start, linear.bias_start + linear.out)
    return range(0)


def _site(program: Program, region: Region, kind: Kind, units: Layout, batch: int) -> Site:
    """The site without counts and drop, named after its writer."""
    slices: list[Slice] = []
    matmuls: list[Matmul] = []
    for place, linear in enumerate(region.producers):
        runs = [run for run in units.runs if run.place == place and not run.outside]
        for run in runs:
            start = linear.start + run.start
            slices.append(Slice(tensor=linear.weight, dim=linear.dim, width=run.width, start=start))
            if linear.bias:
                start = linear.bias_start + run.start
                slices.append(Slice(tensor=linear.bias, dim=0, width=run.width, start=start))
        matmuls.append(_matmul(linear, out_per_unit=sum(run.width for run in runs)))
    for run in units.runs:
        if run.outside:
            name = program.names[region.outside[run.place]]
            slices.append(Slice(tensor=name, dim=run.dim, width=run.width))
    writer = region.writer
    slices.append(Slice(tensor=writer.weight, dim=1 - writer.dim, width=units.width))
    matmuls.append(_matmul(writer, inner_per_unit=units.width))
    tokens = units.tokens or max(1, writer.rows // batch)
    return Site(
        name=writer.weight, kind=kind.name, units=units.units,
        slices=tuple(dict.fromkeys(slices)), matmuls=tuple(matmuls),
        writer=writer.weight, bias=writer.bias, batch=max(1, writer.rows // tokens), tokens=tokens,
        **kind.fields(units),
    )  # fmt: skip


def _matmul(linear: Linear, *, out_per_unit: int = 0, inner_per_unit: int = 0) -> Matmul:
    return Matmul(
        weight=linear.weight, rows=linear.rows, out=linear.out, inner=linear.inner,
        out_per_unit=out_per_unit, inner_per_unit=inner_per_unit, bias=linear.bias is not None,
    )  # fmt: skip


def _without_overlaps(found: Sequence[tuple[Site, str]], skipped: list[Skipped]) -> list[tuple[Site, str]]:
    """Sites that share no weight: of two that do, the first stays."""
    owner: dict[str, str] = {}
    apart: list[tuple[Site, str]] = []
    for site, key in found:
        names = {part.tensor for part in site.slices}
        taken = sorted(names & owner.keys())
        # Sites may share a fused matrix only when they own other parts of it along one dimension.
        if taken and not all(_disjoint(site, other) for other, _ in apart):
            reason = f"{taken[0]} already belongs to the site of {owner[taken[0]]}"
            skipped.append(Skipped(place=common_module(sorted(names)), reason=reason))
            continue
        owner |= dict.fromkeys(names, site.writer)
        apart.append((site, key))
    return apart


def _disjoint(site: Site, other: Site) -> bool:
    for a in site.slices:
        for b in other.slices:
            ends = a.start + site.units * a.width, b.start + other.units * b.width
            beside = a.dim == b.dim and (ends[0] <= b.start or ends[1] <= a.start)
            if a.tensor == b.tensor and not beside:
                return False
    return True


def _verified(
    model: nn.Module,
    example: dict[str, Tensor],
    found: Sequence[tuple[Site, str]],
    skipped: list[Skipped],
) -> list[Site]:
    """The sites that pass their trial, with counts and drop; one trial for places of one structure."""
    places = [common_module([part.tensor for part in site.slices]) for site, _ in found]
    calls = _record_calls(model, example, places)
    tried: dict[str, Site | NotEquivalentError] = {}
    sites: list[Site] = []
    for (site, structure), place in zip(found, places, strict=True):
        around = next((p for p in _enclosing_modules(place) if p in calls), "")
        module = model.get_submodule(around)
        prefix = f"{around}." if around else ""
        own = with_prefix(site, prefix, "")
        key = "\n".join(
            [structure, own.model_copy(update={"name": ""}).model_dump_json(), _structure(module)]
        )
        if key not in tried:
            call = calls.get(around, Call((), example))
            try:
                tried[key] = verify(module, call, own)
            except NotEquivalentError as failure:
                tried[key] = failure
        result = tried[key]
        if isinstance(result, NotEquivalentError):
            skipped.append(Skipped(place=place, reason=str(result)))
        else:
            sites.append(with_prefix(result, "", prefix).model_copy(update={"name": place}))
    return sites


def _structure(module: nn.Module) -> str:
    """What makes two modules alike: classes and shapes of all they hold."""
    shapes = [f"{name}{list(value.shape)}" for name, value in module.named_parameters()]
    return "\n".join([*(type(part).__qualname__ for part in module.modules()), *shapes])


def _enclosing_modules(place: str) -> Iterator[str]:
    """A module's name and those of all that hold it, the whole model last."""
    while place:
        yield place
        place = place.rpartition(".")[0]
    yield ""


def _record_calls(model: nn.Module, example: dict[str, Tensor], places: Sequence[str]) -> dict[str, Call]:
    """What the modules at `places`, and all around them, are called with when the model runs."""
    calls: dict[str, Call] = {}

    def listen(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            calls.setdefault(name, Call(args, kwargs))

        return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [listen(name) for name in {up for place in places for up in _enclosing_modules(place)}]
    try:
        _run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _named_uniquely(sites: Sequence[Site]) -> Iterator[Site]:
    """Sites named after the innermost module around them; with their kind where that holds others."""
    for site in sites:
        crowded = sum(f"{other.name}.".startswith(f"{site.name}.") or not site.name for other in sites)
        name = ".".join(filter(None, [site.name, site.kind])) if crowded > 1 else site.name
        same = [other for other in sites if (other.name, other.kind) == (site.name, site.kind)]
        if len(same) > 1:
            name = f"{site.writer.rpartition('.')[0]}.{site.kind}"
        yield site.model_copy(update={"name": name or site.kind})


def _run(model: nn.Module, example: dict[str, Tensor]) -> None:
    try:
        with plain_attention():
            model(**example)
    except Exception as error:
        shapes = {name: list(value.shape) for name, value in example.items() if hasattr(value, "shape")}
        raise CompressError(
            f"{type(model).__name__} does not run on the example inputs {shapes}: "
            f"{type(error).__name__}: {error}"
        ) from error
