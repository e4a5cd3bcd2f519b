"""The chains of `onnx_chain` as torch modules: what a model holds for one site, a few times over.

Copies have weights of their own, so that caches do not flatter them; residual sums and norms stand
between them, and with 0 units only these are left.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import CompressError
from compress.ir import Matmul, Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "elu": functional.elu,
    "leaky_relu": functional.leaky_relu,
    "silu": functional.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: functional.relu(x).square(),
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
    "": lambda x: x,
}


class Chain(nn.Module):
    """Copies of a site at `units`, each followed by its residual sum and norm, on `[rows, hidden]`."""

    def __init__(self, site: Site, units: int, copies: int) -> None:
        """Random weights from a fixed seed.

        Raises:
            CompressError: the site is of a kind, or its products of sizes, that no chain can be made of.
        """
        super().__init__()
        writer, readers = parts(site)
        hidden = writer.out
        generator = torch.Generator().manual_seed(units)
        body = Attention if site.kind == "heads" else FeedForward
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(copies))
        self.bodies = nn.ModuleList()
        self.writers = nn.ModuleList()
        for _ in range(copies if units else 0):
            self.bodies.append(body(site, readers, units, generator))
            self.writers.append(linear(writer, units, generator))
        self.stand_ins = nn.ParameterList(nn.Parameter(torch.zeros(hidden)) for _ in range(copies))
        self.units = units

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The stream after all copies, [rows, hidden]; the mask [batch, 1, tokens, tokens] is added."""
        for number, norm in enumerate(self.norms):
            if self.units:
                branch = self.writers[number](self.bodies[number](x, mask))
            else:
                branch = self.stand_ins[number]
            x = norm(x + branch)
        return x


def parts(site: Site) -> tuple[Matmul, list[Matmul]]:
    """The product that units own columns of, and those that they own rows of.

    Raises:
        CompressError: these are not one and at least one, on one hidden width.
    """
    writers = [m for m in site.matmuls if m.inner_per_unit]
    readers = [m for m in site.matmuls if m.out_per_unit]
    if site.kind not in ("heads", "ffn") or len(writers) != 1 or not readers:
        raise CompressError(f"{site.name}: a site of kind {site.kind!r} cannot be timed alone")
    if any(reader.inner != writers[0].out for reader in readers):
        raise CompressError(f"{site.name}: products of different hidden widths cannot be timed together")
    return writers[0], readers


def linear(matmul: Matmul, units: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer of the product's sizes at `units`."""
    out, inner = matmul.features(units)
    layer = nn.Linear(inner, out, bias=matmul.bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, inner, generator=generator) / math.sqrt(inner))
        if matmul.bias:
            layer.bias.copy_(0.1 * torch.randn(out, generator=generator))
    return layer


class FeedForward(nn.Module):
    """Up product(s), activation and gate; an activation that is not known costs what Gelu does."""

    def __init__(self, site: Site, readers: Sequence[Matmul], units: int, generator: torch.Generator) -> None:
        super().__init__()
        self.ups = nn.ModuleList(linear(reader, units, generator) for reader in readers)
        self.activation = ACTIVATIONS.get(site.activation, functional.gelu)
        self.gated, self.units = site.gated, units

    def forward(self, x: Tensor, _: Tensor | None) -> Tensor:
        """[rows, hidden] -> [rows, units]."""
        outs = [up(x) for up in self.ups]
        if self.gated and len(outs) == 1:
            outs = list(outs[0].split(self.units, dim=-1))
        inside = self.activation(outs[0])
        for other in outs[1:]:
            inside = inside * other
        return inside


class Attention(nn.Module):
    """Projections, attention of all kept heads in one call, and their outputs side by side.

    In decoding, keys and values of the past come before the new ones.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, site: Site, readers: Sequence[Matmul], units: int, generator: torch.Generator) -> None:
        """Separate or fused projections; the widest first, which is the query where queries are grouped.

        Raises:
            CompressError: query, key and value cannot be told apart in the products.
        """
        super().__init__()
        wanted = [site.queries * site.head_dim, site.head_dim, site.head_dim]
        self.readers = nn.ModuleList()
        self.widths: list[list[int]] = []
        for reader in sorted(readers, key=lambda m: -m.out_per_unit):
            widths: list[int] = []
            while wanted and sum(widths) < reader.out_per_unit:
                widths.append(wanted.pop(0))
            if sum(widths) != reader.out_per_unit:
                raise CompressError(
                    f"{site.name}: an attention whose products give {[m.out_per_unit for m in readers]} "
                    "features a unit cannot be timed alone"
                )
            self.readers.append(linear(reader, units, generator))
            self.widths.append([units * width for width in widths])
        if wanted:
            raise CompressError(
                f"{site.name}: only {3 - len(wanted)} of query, key and value lie in its products"
            )
        self.batch, self.tokens = site.batch, site.tokens
        self.head_dim, self.grouped = site.head_dim, site.queries > 1
        held = (site.batch, units, site.past, site.head_dim)
        self.register_buffer("keys", torch.randn(held, generator=generator))
        self.register_buffer("values", torch.randn(held, generator=generator))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[rows, hidden] -> [rows, heads * head_dim]."""
        outs: list[Tensor] = []
        for reader, widths in zip(self.readers, self.widths, strict=True):
            outs += reader(x).split(widths, dim=-1)
        query, key, value = (
            out.reshape(self.batch, self.tokens, -1, self.head_dim).transpose(1, 2) for out in outs
        )
        if self.keys.shape[2]:
            key, value = torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
        context = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=self.grouped
        )
        return context.transpose(1, 2).reshape(len(x), -1)


def inputs(site: Site, units: int) -> tuple[Tensor, Tensor | None]:
    """A random stream and, where there is attention, the mask that the model would add.

    Raises:
        CompressError: the rows of the site's products are not its batch times its tokens.
    """
    rows = site.matmuls[0].rows
    hidden = next(m.inner for m in site.matmuls if m.out_per_unit)
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(0))
    if site.kind != "heads":
        return x, None
    if rows != site.batch * site.tokens:
        raise CompressError(
            f"{site.name}: {rows} rows are not batch {site.batch} x {site.tokens} tokens; not timed"
        )
    if not units:
        return x, None
    mask = torch.zeros(site.batch, 1, site.tokens, site.past + site.tokens)
    if site.causal:  # a float16 holds no more than 6e4
        mask[..., site.past :] += torch.full((site.tokens, site.tokens), -1e4).triu(1)
    return x, mask
