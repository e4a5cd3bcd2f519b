"""The chains of `onnx_chain` as torch modules: what a model holds for one site, a few times over.

Copies have weights of their own, so that caches do not flatter them; residual sums and norms stand
between them, and with 0 units only these are left.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import CompressError
from compress.ir import Matmul, Site
from compress.sites.kinds import kind_of

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
            CompressError: the kind of the site cannot be timed alone, or its products are not understood.
        """
        super().__init__()
        writer, readers = kind_of(site).parts(site)
        hidden = writer.out
        generator = torch.Generator().manual_seed(units)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(copies))
        self.bodies = nn.ModuleList()
        self.writers = nn.ModuleList()
        for _ in range(copies if units else 0):
            self.bodies.append(Body(site, readers, units, generator))
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


def linear(matmul: Matmul, units: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer of the product's sizes at `units`."""
    out, inner = matmul.features(units)
    layer = nn.Linear(inner, out, bias=matmul.bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, inner, generator=generator) / math.sqrt(inner))
        if matmul.bias:
            layer.bias.copy_(0.1 * torch.randn(out, generator=generator))
    return layer


class Body(nn.Module):
    """What stands between the stream and the writer of one site, as its kind describes it.

    In decoding, keys and values of the past come before the new ones.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, site: Site, readers: Sequence[Matmul], units: int, generator: torch.Generator) -> None:
        super().__init__()
        self.site, self.units, self.kind = site, units, kind_of(site)
        self.products = nn.ModuleList(linear(reader, units, generator) for reader in readers)
        held = (site.batch, units, site.past, site.head_dim) if self.kind.attends else (0, 0, 0, 0)
        self.register_buffer("keys", torch.randn(held, generator=generator))
        self.register_buffer("values", torch.randn(held, generator=generator))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[rows, hidden] -> [rows, columns of the writer]."""
        return self.kind.body(_TorchBuilder(self, mask), x, self.site, self.units)


@dataclass(frozen=True)
class _TorchBuilder:
    """Computes the operators of one site instead of writing them down."""

    body: Body
    mask: Tensor | None

    def product(self, x: Tensor, reader: int) -> Tensor:
        product: Tensor = self.body.products[reader](x)
        return product

    def split(self, x: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
        return torch.split(x, list(widths), dim=-1)

    def activation(self, x: Tensor, name: str) -> Tensor:
        return ACTIVATIONS.get(name, functional.gelu)(x)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of all kept heads in one call."""
        body, site = self.body, self.body.site
        query, key, value = (
            out.reshape(site.batch, site.tokens, -1, site.head_dim).transpose(1, 2)
            for out in (query, key, value)
        )
        if site.past:
            key, value = torch.cat([body.keys, key], dim=2), torch.cat([body.values, value], dim=2)
        context = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, enable_gqa=site.queries > 1
        )
        return context.transpose(1, 2).reshape(site.batch * site.tokens, -1)


def inputs(site: Site, units: int) -> tuple[Tensor, Tensor | None]:
    """A random stream and, where there is attention, the mask that the model would add.

    Raises:
        CompressError: the rows of the site's products are not its batch times its tokens.
    """
    rows = site.matmuls[0].rows
    hidden = next(m.inner for m in site.matmuls if m.out_per_unit)
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(0))
    if not kind_of(site).attends:
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
