"""Linear layers whose product runs in another form through torch: 2:4 zeros, blocks, int8, fp8.

Weights are [out, in]. Each layer computes on a CPU what it computes on a GPU, up to the order of sums;
only the time differs. A layer that a form does not fit stays as it is, and its name is returned.
"""

import re
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import CompressError

INT8_MOST = 127.0
FP8_MOST = 448.0  # largest number of e4m3
LEAST_ROWS = 32  # torch._int_mm wants more than 16 rows on a GPU
FP8_CAPABILITY = (8, 9)
SPARSE_CAPABILITY = (8, 0)


class SparseLinear(nn.Module):
    """A weight with at most two of every four neighbours in a row left; half of it is stored on a GPU.

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack the weight where it lies.

        Raises:
            CompressError: a group of four holds more than two numbers.
        """
        super().__init__()
        full = (weight.detach().reshape(len(weight), -1, 4) != 0).sum(-1) > 2
        if full.any():
            row, group = (int(index) for index in full.nonzero()[0])
            raise CompressError(
                f"{int(full.sum())} of {full.numel()} groups of four are not 2:4, the first in row {row}, "
                f"columns {4 * group} to {4 * group + 3}; prune the weight before it is packed"
            )
        packed = weight.detach().contiguous()
        if weight.is_cuda:
            _capable("2:4 products", SPARSE_CAPABILITY)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch calls the format a prototype
                packed = torch.sparse.to_sparse_semi_structured(packed)
        self.weight = packed  # no buffer: its tensor class does not move between devices
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(x, self.weight, self.bias)


class BlockLinear(nn.Module):
    """A weight of which every band of rows keeps the same number of column blocks.

    The kept blocks of the input are gathered for every band, and one batched product does the rest.
    """

    blocks: Tensor
    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> None:
        """Keep the blocks of `rows` x `columns` that hold anything.

        Raises:
            CompressError: the block does not divide the weight, or bands keep different numbers.
        """
        super().__init__()
        out, inner = weight.shape
        if out % rows or inner % columns:
            raise CompressError(f"blocks of {rows}x{columns} do not divide a weight of {out}x{inner}")
        tiles = weight.detach().reshape(out // rows, rows, inner // columns, columns).transpose(1, 2)
        used = (tiles != 0).flatten(2).any(-1)  # [bands, column blocks]
        counts = used.sum(1)
        if not bool((counts == counts[0]).all()) or not counts[0]:
            raise CompressError(
                f"every band of {rows} rows must keep the same number of blocks, at least one; "
                f"found {sorted(set(counts.tolist()))}"
            )
        blocks = used.nonzero()[:, 1].reshape(len(used), -1)  # [bands, kept]
        kept = torch.stack([band[own] for band, own in zip(tiles, blocks, strict=True)])
        self.columns = columns
        self.register_buffer("blocks", blocks)
        self.register_buffer("weight", kept.transpose(2, 3).flatten(1, 2).contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1] // self.columns, self.columns)
        bands, kept = self.blocks.shape
        parts = flat.index_select(1, self.blocks.flatten())  # [tokens, bands * kept, columns]
        parts = parts.reshape(len(flat), bands, kept * self.columns).transpose(0, 1)
        y = torch.bmm(parts, self.weight).transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """Products of 8-bit whole numbers, summed exactly: rows of the input and of the weight are scaled.

    `input_scale` None finds the scale of every row of the input as it comes (dynamic).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, input_scale: float | None = None) -> None:
        super().__init__()
        w = weight.detach().float()
        scale = w.abs().amax(1, keepdim=True).clamp_min(1e-12) / INT8_MOST
        self.register_buffer("weight", _int8(w, scale))
        self.register_buffer("scale", scale.reshape(1, -1))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.input_scale = input_scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if self.input_scale is None:
            scale = flat.abs().amax(1, keepdim=True).clamp_min(1e-12) / INT8_MOST
        else:
            scale = torch.full((1, 1), self.input_scale, device=x.device)
        q = _int8(flat, scale)
        if len(q) < LEAST_ROWS:
            q = functional.pad(q, (0, 0, 0, LEAST_ROWS - len(q)))
        sums = torch._int_mm(q, self.weight.t())[: len(flat)]
        y = sums.float() * scale * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def _int8(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).round().clamp(-INT8_MOST, INT8_MOST).to(torch.int8)


class Fp8Linear(nn.Module):
    """Products of 8-bit floating-point numbers (e4m3), one scale for the weight and one for the input."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, input_scale: float | None = None) -> None:
        super().__init__()
        if weight.is_cuda:
            _capable("fp8 products", FP8_CAPABILITY)
        w = weight.detach().float()
        scale = w.abs().amax().clamp_min(1e-12) / FP8_MOST
        self.register_buffer("weight", _fp8(w, scale))
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.input_scale = input_scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if self.input_scale is None:
            scale = flat.abs().amax().clamp_min(1e-12) / FP8_MOST
        else:
            scale = torch.full((), self.input_scale, device=x.device)
        y = torch._scaled_mm(
            _fp8(flat, scale), self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype
        )
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def _fp8(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)


def _capable(what: str, least: tuple[int, int]) -> None:
    found = torch.cuda.get_device_capability()
    if found < least:
        raise CompressError(
            f"{what} need compute capability {least[0]}.{least[1]}; {torch.cuda.get_device_name()} has "
            f"{found[0]}.{found[1]}"
        )


def prune_24(weight: Tensor) -> Tensor:
    """The weight with the two largest of every four columns of a row, for timing only.

    >>> prune_24(torch.tensor([[1.0, -4.0, 3.0, 2.0]])).tolist()
    [[0.0, -4.0, 3.0, 0.0]]
    """
    groups = weight.reshape(len(weight), -1, 4)
    kept = groups.abs().argsort(dim=-1, descending=True, stable=True)[..., :2]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True)
    return (groups * mask).reshape(weight.shape)


def prune_blocks(weight: Tensor, rows: int, columns: int, density: float) -> Tensor:
    """The weight with the heaviest column blocks of every band of rows, for timing only."""
    out, inner = weight.shape
    tiles = weight.reshape(out // rows, rows, inner // columns, columns)
    norms = tiles.square().sum((1, 3))  # [bands, column blocks]
    kept = norms.argsort(dim=1, descending=True, stable=True)[:, : max(1, round(density * norms.shape[1]))]
    mask = torch.zeros_like(norms, dtype=torch.bool).scatter_(1, kept, True)
    return (tiles * mask[:, None, :, None]).reshape(out, inner)


Make = Callable[[nn.Linear], nn.Module]


def _sparse(layer: nn.Linear) -> nn.Module:
    return SparseLinear(prune_24(layer.weight.detach()), layer.bias)


def _int8_layer(layer: nn.Linear) -> nn.Module:
    return Int8Linear(layer.weight, layer.bias)


def _fp8_layer(layer: nn.Linear) -> nn.Module:
    return Fp8Linear(layer.weight, layer.bias)


# By form: the multiples that a weight's sizes must be, and the layer.
FORMS: dict[str, tuple[int, int, Make]] = {
    "2:4": (32, 64, _sparse),
    "int8": (8, 8, _int8_layer),
    "fp8": (16, 16, _fp8_layer),
}


def form(words: str) -> tuple[int, int, Make]:
    """What a form asks of a weight's sizes, and what makes the layer; `block:32x128@0.25` among them.

    Raises:
        CompressError: there is no such form.
    """
    block = re.fullmatch(r"block:(\d+)x(\d+)@([0-9.]+)", words)
    if block is not None:
        rows, columns, density = int(block[1]), int(block[2]), float(block[3])

        def make(layer: nn.Linear) -> nn.Module:
            pruned = prune_blocks(layer.weight.detach(), rows, columns, density)
            return BlockLinear(pruned, layer.bias, rows, columns)

        return rows, columns, make
    if words not in FORMS:
        raise CompressError(
            f"{words!r} is no form of a product; known: {', '.join(FORMS)}, block:RxC@DENSITY"
        )
    return FORMS[words]


def convert(model: nn.Module, words: str, names: Iterable[str] | None = None) -> list[str]:
    """Replace linear layers of `model` by the form, in place; the names of those that it does not fit.

    Args:
        model: on the device where it will run.
        words: "2:4", "int8", "fp8" or `block:RxC@DENSITY`.
        names: modules to replace; all linear layers unless given.
    """
    out_step, inner_step, make = form(words)
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    left = []
    for name in found if names is None else names:
        layer = found[name]
        out, inner = layer.weight.shape
        if out % out_step or inner % inner_step:
            left.append(name)
            continue
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, make(layer))
    return left
