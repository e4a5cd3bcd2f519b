"""The fallback for models that cannot be traced: linear layers known by their names.

Everything found here passes the same equivalence check as what is found in a traced program, so a
misleading name costs a site but never gives a wrong result.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from compress.ir import Matmul, Site, Slice
from compress.sites.grouping import identify_activation
from compress.sites.kinds import KINDS
from compress.sites.kinds.kind import Kind
from compress.sites.kinds.layout import Layout


def named_sites(model: nn.Module, example: dict[str, Tensor], batch: int) -> list[tuple[Site, str]]:
    """Sites without counts and drop, each with a key of its structure, in the order of the modules."""
    seen = _record_layers(model, example)
    found: list[tuple[Site, str]] = []
    taken: set[str] = set()
    for place, module in model.named_modules():
        for kind in KINDS.values():
            for pattern in kind.patterns:
                names = [f"{place}.{name}".lstrip(".") for name in (*pattern.producers, pattern.writer)]
                if taken.isdisjoint(names) and all(name in seen for name in names):
                    units = _units(kind, module, _width(model, names[-1])[1])
                    site = _site(model, names, pattern.parts, units, kind, seen, batch)
                    if site is not None:
                        taken |= set(names)
                        found.append((site, f"{pattern}"))
    return found


def _record_layers(model: nn.Module, example: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every linear layer on the example, by name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                seen[name] = (args[0], output)

            handles.append(module.register_forward_hook(hook))
    try:
        model(**example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _width(model: nn.Module, name: str) -> tuple[int, int]:
    """`(out, inner)` of a linear layer."""
    module = model.get_submodule(name)
    out, inner = module.get_parameter("weight").shape
    return (out, inner) if isinstance(module, nn.Linear) else (inner, out)


def _integer_attribute(module: nn.Module, names: Sequence[str]) -> int:
    """The first attribute of these names on the module, a part of it or its configuration; else 0."""
    owners: list[object] = list(module.modules())
    owners += [part.config for part in module.modules() if hasattr(part, "config")]
    for owner in owners:
        for name in names:
            value = getattr(owner, name, 0)
            if type(value) is int and value > 0:
                return value
    return 0


def _units(kind: Kind, module: nn.Module, columns: int) -> int:
    """How many units the module states, 0 where it should and does not; else one for each column."""
    if not kind.count_attributes:
        return columns
    stated = (_integer_attribute(module, names) for names in kind.count_attributes)
    return next((count for count in stated if count), 0)


def _site(
    model: nn.Module,
    names: Sequence[str],
    parts: int,
    units: int,
    kind: Kind,
    seen: dict[str, tuple[Tensor, Tensor]],
    batch: int,
) -> Site | None:
    """The site of these layers, None where their widths are no multiples of the units."""
    *producers, writer = names
    inner = _width(model, writer)[1]
    if units < 2 or inner % units:
        return None
    width = inner // units
    slices: list[Slice] = []
    matmuls: list[Matmul] = []
    for name in producers:
        rows = _width(model, name)[0]
        segments = _segments(rows, inner, parts)
        if any(length % units for _, length in segments):
            return None
        module = model.get_submodule(name)
        dim = 0 if isinstance(module, nn.Linear) else 1
        for start, length in segments:
            run = length // units
            slices.append(Slice(tensor=f"{name}.weight", dim=dim, width=run, start=start))
            if getattr(module, "bias", None) is not None:
                slices.append(Slice(tensor=f"{name}.bias", dim=0, width=run, start=start))
        matmuls.append(_matmul(model, name, seen, out_per_unit=rows // units))
    own = model.get_submodule(writer)
    slices.append(Slice(tensor=f"{writer}.weight", dim=1 if isinstance(own, nn.Linear) else 0, width=width))
    matmuls.append(_matmul(model, writer, seen, inner_per_unit=width))
    total = matmuls[-1].rows
    around = model.get_submodule(".".join(writer.split(".")[:-1]))
    activation, gated = ("", False) if kind.attends else _activation(names, parts, seen)
    layout = Layout(
        units=units, width=width, runs=(), attention=kind.attends,
        head_dim=slices[-2].width if kind.attends else 0,
        causal=kind.attends and bool(getattr(around, "is_causal", False)),
        activation=activation, gated=gated,
    )  # fmt: skip
    return Site(
        name=f"{writer}.weight", kind=kind.name, units=units, slices=tuple(slices),
        matmuls=tuple(matmuls), writer=f"{writer}.weight",
        bias=f"{writer}.bias" if getattr(own, "bias", None) is not None else None,
        batch=batch, tokens=max(1, total // batch), **kind.fields(layout),
    )  # fmt: skip


def _segments(rows: int, inner: int, parts: int) -> list[tuple[int, int]]:
    """Start and length of the pieces of a fused layer: the first is as wide as the writer's input."""
    if parts == 1:
        return [(0, rows)]
    if parts == 2:
        return [(0, rows // 2), (rows // 2, rows // 2)]
    rest = (rows - inner) // 2
    return [(0, inner), (inner, rest), (inner + rest, rest)]


def _matmul(
    model: nn.Module,
    name: str,
    seen: dict[str, tuple[Tensor, Tensor]],
    *,
    out_per_unit: int = 0,
    inner_per_unit: int = 0,
) -> Matmul:
    out, inner = _width(model, name)
    return Matmul(
        weight=f"{name}.weight", rows=seen[name][0].numel() // inner, out=out, inner=inner,
        out_per_unit=out_per_unit, inner_per_unit=inner_per_unit,
        bias=getattr(model.get_submodule(name), "bias", None) is not None,
    )  # fmt: skip


def _activation(names: Sequence[str], parts: int, seen: dict[str, tuple[Tensor, Tensor]]) -> tuple[str, bool]:
    """The function between producers and writer, read off the values that went through."""
    inputs = [piece for name in names[:-1] for piece in _split_fused(seen[name][1], parts)]
    flat = [piece.flatten() for piece in inputs]
    with torch.no_grad():
        return identify_activation(flat, seen[names[-1]][0].flatten()), len(inputs) > 1


def _split_fused(value: Tensor, parts: int) -> Iterator[Tensor]:
    yield from value.chunk(parts, dim=-1)
