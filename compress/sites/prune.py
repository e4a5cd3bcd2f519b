"""Removing units from a model: at full shape for the search (mask), and physically (shrink).

A removal names the units that stay, the writer's new columns, and new values of the site's other
matrices. `mask` zeroes what is gone, which is what the shrunk model computes, at the dense shape; `shrink`
cuts every slice. A site that loses all its units loses its module: a stand-in gives the writer's bias, so
that a post-norm model keeps `norm(residual + bias)` and a pre-norm model `residual + bias`.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.core.fakequant import Quantized
from compress.core.units import cut, index_of, remaining
from compress.errors import CompressError
from compress.ir import Drop, Site, Slice
from compress.sites.modeling import Bias, owner, replace, restate_widths, set_count

Sites = Iterable[Site] | Mapping[str, Site]


@dataclass(frozen=True, eq=False)
class Removal:
    """What stays of one site.

    Attributes:
        kept: sorted indices of the units that stay, int64.
        weight: the writer's kept columns, [out, kept * width] whatever the storage; None keeps its own.
        bias: the writer's new bias, [out]; None keeps its own. A writer without one gains it.
        readers: new values of the site's other matrices, or of anything else that it owns, by name,
            stored and shaped as they are after the cut; what has no entry keeps its own.
        form: how the products are to run, a string as from `ir.Option.form`.
        factors: where the form has a rank: [out, rank] and [rank, in] by name of the matrix; what they
            do not give of its values is sparse.
        codes: where the form has a low precision: what the values stand for, by name of the matrix.
    """

    kept: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    readers: Mapping[str, Tensor] = field(default_factory=dict)
    form: str = "dense"
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    codes: Mapping[str, Quantized] = field(default_factory=dict)


def mask(model: nn.Module, sites: Sites, removals: Mapping[str, Removal]) -> nn.Module:
    """A copy at full shape that computes what the shrunk model computes."""
    listed = check(model, sites, removals)
    masked = copy.deepcopy(model)
    for site in listed:
        if site.name in removals:
            write_weights(masked, site, removals[site.name])
    return masked


def shrink(model: nn.Module, sites: Sites, removals: Mapping[str, Removal]) -> nn.Module:
    """A copy that is physically smaller; `model` is untouched."""
    shrunk = copy.deepcopy(model)
    shrink_in_place(shrunk, sites, removals)
    return shrunk


def shrink_in_place(model: nn.Module, sites: Sites, removals: Mapping[str, Removal]) -> None:
    """Make `model` itself physically smaller: for a caller that owns it and cannot hold two."""
    going = [site for site in check(model, sites, removals) if site.name in removals]
    for site in going:
        if not len(removals[site.name].kept):
            require_drop(site)
        write_weights(model, site, removals[site.name])
    for site in going:
        kept = removals[site.name].kept
        if len(kept):
            _cut_site(model, site, kept)
    for site in going:
        if not len(removals[site.name].kept):
            _drop(model, site)
    restate_widths(model)


def write_weights(model: nn.Module, site: Site, removal: Removal) -> None:
    """Write one removal into the products of `model`, in place; nothing else is read or written."""
    weight = writer_columns(model, site)
    _check_removal(site, removal, weight)
    everything = index_of(site.column, torch.arange(site.units, device=weight.device))
    stay = index_of(site.column, removal.kept.to(weight.device))
    values = weight[:, stay] if removal.weight is None else removal.weight.to(weight)
    weight[:, everything] = 0
    weight[:, stay] = values
    if removal.bias is not None:
        _set_bias(model, site, removal.bias)
    for name, new in removal.readers.items():
        dims = {part.dim for part in site.slices if part.tensor == name}
        stay = kept_positions(model, site, name, removal.kept)
        model.get_parameter(name).detach().index_copy_(dims.pop(), stay, new.to(weight))


def readers(site: Site) -> list[str]:
    """Names of a site's matrices besides the writer's, each once."""
    return list(dict.fromkeys(m.weight for m in site.matmuls if m.weight != site.writer))


def kept_reader_weight(model: nn.Module, site: Site, name: str, kept: Tensor) -> Tensor:
    """What the kept units leave of one reader's weight, stored as it is."""
    dim = next(part.dim for part in site.slices if part.tensor == name)
    return model.get_parameter(name).detach().index_select(dim, kept_positions(model, site, name, kept))


def kept_positions(model: nn.Module, site: Site, name: str, kept: Tensor) -> Tensor:
    """Positions along the owned dimension of one tensor that stay."""
    parts = [part for part in site.slices if part.tensor == name]
    value = model.get_parameter(name)
    return remaining(parts, kept.to(value.device), units=site.units, length=value.shape[parts[0].dim])


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Copies of what `objective` may change of a site, as it is stored, and of the writer's bias."""

    weights: Mapping[str, Tensor]
    bias: Tensor | None


def take_snapshot(model: nn.Module, site: Site) -> Snapshot:
    """What `objective` may change of a site."""
    bias = _bias(model, site)
    names = dict.fromkeys([site.writer, *readers(site), *(part.tensor for part in site.channels)])
    return Snapshot(
        {name: model.get_parameter(name).detach().clone() for name in names},
        None if bias is None else bias.detach().clone(),
    )


def restore(model: nn.Module, site: Site, found: Snapshot) -> None:
    """Put a site back as `products` found it; a bias its writer has gained since is taken away."""
    for name, value in found.weights.items():
        model.get_parameter(name).detach().copy_(value)
    bias = found.bias
    if bias is not None:
        _set_bias(model, site, bias)
    elif _bias(model, site) is not None:
        model.get_submodule(owner(site.writer)).register_parameter("bias", None)


def parameters_after(
    model: nn.Module, sites: Sites, units: Mapping[str, int], *, biased: bool = False
) -> int:
    """Parameters of the shrunk model, predicted from shapes alone; shared ones count once.

    Args:
        model: the dense model.
        sites: its sites.
        units: units kept by site; a site without an entry keeps all.
        biased: every removal brings a bias, so a writer without one gains it where units go.
    """
    listed = [site for site in check(model, sites, units) if units.get(site.name) is not None]
    shapes = {id(value): list(value.shape) for value in model.parameters()}
    gone: set[str] = set()
    added = 0
    for site in listed:
        kept, bias = units[site.name], _bias(model, site)
        if not 0 <= kept <= site.units:
            raise CompressError(f"{site.name} cannot keep {kept} units; it has {site.units}")
        if kept == 0:
            gone |= _names_dropped(model, site)
            added += 0 if bias is None else bias.numel()
        else:
            for value, part in _parts(model, site):
                if id(value) in shapes:
                    shapes[id(value)][part.dim] -= (site.units - kept) * part.width
        if biased and bias is None and kept < site.units:
            added += writer_columns(model, site).shape[0]
    staying = {
        id(value) for name, value in model.named_parameters(remove_duplicate=False) if name not in gone
    }
    return added + sum(torch.Size(shape).numel() for key, shape in shapes.items() if key in staying)


def check(model: nn.Module, sites: Sites, names: Iterable[str] = ()) -> list[Site]:
    """The sites as a list, after making sure that they are disjoint and describe this model.

    Args:
        model: at its original shape.
        sites: any number of them, in any order.
        names: of sites that are going to be changed.

    Raises:
        CompressError: a tensor, module or count of a site is not there or not as described.
    """
    listed = list(sites.values() if isinstance(sites, Mapping) else sites)
    unknown = sorted(set(names) - {site.name for site in listed})
    if unknown:
        raise CompressError(f"{unknown[0]} is not a site; there are {len(listed)} others")
    taken: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    for site in listed:
        _check_structure(model, site)
        for value, part in _parts(model, site):
            start, end = part.start, part.start + site.units * part.width
            others = taken.setdefault((id(value), part.dim), [])
            for low, high, name in others:
                if start < high and low < end:
                    raise CompressError(
                        f"sites {name} and {site.name} both own part of {part.tensor} along dimension "
                        f"{part.dim}; sites must be disjoint"
                    )
            others.append((start, end, site.name))
    return listed


def require_drop(site: Site) -> Drop:
    """How the module of a site is replaced when no unit is left.

    Raises:
        CompressError: the module cannot be replaced.
    """
    if site.drop is None:
        raise CompressError(
            f"{site.name}: all {site.units} units are to go, but what its module returns besides the "
            "hidden state is needed elsewhere, or is not known; keep 1 unit"
        )
    return site.drop


def _check_structure(model: nn.Module, site: Site) -> None:
    """Every name of a site is there, every slice inside its tensor, every count as stated."""
    for part in site.slices:
        value = _tensor(model, site, part.tensor)
        end = part.start + site.units * part.width
        if part.dim >= value.ndim or end > value.shape[part.dim]:
            raise CompressError(
                f"{site.name}: {site.units} units own [{part.start}, {end}) of dimension {part.dim} of "
                f"{part.tensor}, which is {list(value.shape)}; the site belongs to another model, or "
                "to this one before it was shrunk"
            )
    if site.writer not in [part.tensor for part in site.slices]:
        raise CompressError(f"{site.name}: no slice of its writer {site.writer}")
    if site.column.dim > 1 or _tensor(model, site, site.writer).ndim != 2:
        raise CompressError(f"{site.name}: its writer {site.writer} is not a matrix")
    if site.bias is not None:
        _tensor(model, site, site.bias)
    for count in site.counts:
        found: object = _module(model, site, count.module)
        for step in count.attribute.split("."):
            found = getattr(found, step, None)
        if type(found) is not int or found != site.units * count.per_unit:
            words = found if type(found) is int else f"a {type(found).__name__}"
            raise CompressError(
                f"{site.name}: {count.module}.{count.attribute} is {words}, not {site.units} x "
                f"{count.per_unit}; the site belongs to another model"
            )
    if site.drop is not None and _module(model, site, site.drop.module) is model:
        raise CompressError(f"{site.name}: the whole model cannot be dropped")


def _check_removal(site: Site, removal: Removal, weight: Tensor) -> None:
    """The removal fits the site: sorted distinct units, tensors of the right shape."""
    kept, out = removal.kept, weight.shape[0]
    if kept.dtype != torch.int64 or kept.ndim != 1 or not bool((kept.diff() > 0).all()):
        raise CompressError(
            f"{site.name}: kept units must be sorted, distinct and int64, not {kept.tolist()} of {kept.dtype}"
        )
    if len(kept) and not 0 <= int(kept[0]) <= int(kept[-1]) < site.units:
        raise CompressError(f"{site.name}: units {kept.tolist()} of {site.units} cannot be kept")
    wanted = {
        "weight": (removal.weight, [out, len(kept) * site.column.width]),
        "bias": (removal.bias, [out]),
    }
    for name, (value, shape) in wanted.items():
        if value is not None and list(value.shape) != shape:
            raise CompressError(
                f"{site.name}: the new {name} of {site.writer} is {list(value.shape)}; "
                f"{len(kept)} units kept need {shape}"
            )


def _module(model: nn.Module, site: Site, name: str) -> nn.Module:
    """A submodule by its dotted name."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CompressError(f"{site.name}: this model has no module {name!r}") from error


def _tensor(model: nn.Module, site: Site, name: str) -> Tensor:
    """A parameter or buffer by its state-dict name."""
    value = getattr(_module(model, site, owner(name)), name.rpartition(".")[2], None)
    if not isinstance(value, Tensor):
        raise CompressError(f"{site.name}: this model has no tensor {name!r}")
    return value


def writer_columns(model: nn.Module, site: Site) -> Tensor:
    """The writer's weight as [out, in], sharing its memory, outside of autograd."""
    weight = model.get_parameter(site.writer).detach()
    return weight if site.column.dim == 1 else weight.T


def _bias(model: nn.Module, site: Site) -> nn.Parameter | None:
    """The writer's bias, its own or one that it has gained."""
    if site.bias is not None:
        return model.get_parameter(site.bias)
    bias = getattr(model.get_submodule(owner(site.writer)), "bias", None)
    return bias if isinstance(bias, nn.Parameter) else None


def _set_bias(model: nn.Module, site: Site, value: Tensor) -> None:
    """Write the writer's bias; a linear layer without one gains it, in the dtype of its weight."""
    bias = _bias(model, site)
    if bias is not None:
        bias.detach().copy_(value)
        return
    weight, writer = model.get_parameter(site.writer), model.get_submodule(owner(site.writer))
    if not isinstance(writer, nn.Linear):
        raise CompressError(
            f"{site.name}: {site.writer} lies in a {type(writer).__name__} without a bias, which cannot "
            "gain one; give it a bias or make it an nn.Linear"
        )
    own = value.detach().to(weight.device, weight.dtype, copy=True)
    writer.bias = nn.Parameter(own, requires_grad=weight.requires_grad)


def _parts(model: nn.Module, site: Site) -> list[tuple[Tensor, Slice]]:
    """The slices of a site with their tensors; one that is reached by two names is listed once."""
    found: dict[tuple[int, int, int], tuple[Tensor, Slice]] = {}
    for part in site.slices:
        value = _tensor(model, site, part.tensor)
        found.setdefault((id(value), part.dim, part.start), (value, part))
    return list(found.values())


def _cut_site(model: nn.Module, site: Site, kept: Tensor) -> None:
    """Cut every tensor of a site once, and set its counts."""
    slices: dict[int, list[Slice]] = {}
    tensors: dict[int, Tensor] = {}
    for value, part in _parts(model, site):
        tensors[id(value)] = value
        slices.setdefault(id(value), []).append(part)
    for key, value in tensors.items():
        # The tensor object stays, only its contents change: whatever shares it keeps sharing it.
        value.grad = None
        value.data = cut(value.detach(), slices[key], kept.to(value.device), units=site.units)
    for count in site.counts:
        set_count(model.get_submodule(count.module), count.attribute, len(kept) * count.per_unit)


def _drop(model: nn.Module, site: Site) -> None:
    """Put the stand-ins where the module, and a writer outside of it, were."""
    drop = require_drop(site)
    bias = Bias(writer_columns(model, site).shape[0], _bias(model, site))
    replace(model, drop, drop.module, None if drop.writer else owner(site.writer), bias)


def _names_dropped(model: nn.Module, site: Site) -> set[str]:
    """Names of all parameters in the modules that stand-ins replace."""
    modules = {require_drop(site).module, owner(site.writer)}
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return {name for name in names if any(name.startswith(f"{module}.") for module in modules)}
