"""Linear layers whose product runs in another form through torch: 2:4 zeros, blocks, ranks, int8, fp8.

Weights are [out, in]. Each layer computes on a CPU what it computes on a GPU, up to the order of sums;
only the time differs. A layer that a form does not fit stays as it is, and its name is returned.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress import formats
from compress.core import fakequant
from compress.core.support import quota
from compress.errors import CompressError
from compress.ir import Option

MIDDLE = 128.0  # between bytes and signed bytes
TIMED_SPAN = (-16.0, 16.0)
FP8_MOST = 448.0  # largest number of e4m3
LEAST_ROWS = 32  # torch._int_mm wants more than 16 rows on a GPU
FP8_CAPABILITY = (8, 9)
SPARSE_CAPABILITY = (8, 0)
Work = Callable[..., Any]


class SparseLinear(nn.Module):
    """A weight with at most two of every four neighbours in a row left; half of it is stored on a GPU.

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Pack the weight on its own device.

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


class BsrLinear(nn.Module):
    """A weight in block compressed rows, multiplied by the kernels that torch has for them in Triton.

    Unlike `BlockLinear` it gathers nothing: every band of rows reads the inputs of its own blocks.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> None:
        """Pack the blocks of `rows` x `columns` that hold anything."""
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls the layout a beta
            self.weight = weight.detach().to_sparse_bsr((rows, columns))  # no buffer: it is not moved
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.step = max(rows, 16)  # rows of an input are cut into tiles as high as a block

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        from torch.sparse._triton_ops import bsr_dense_addmm

        flat = x.reshape(-1, x.shape[-1])
        padded = functional.pad(flat, (0, 0, 0, -len(flat) % self.step))
        out = self.weight.shape[0]
        bias = x.new_zeros(out) if self.bias is None else self.bias
        y: Tensor = bsr_dense_addmm(bias[:, None].expand(out, len(padded)), self.weight, padded.t())
        return y.t()[: len(flat)].reshape(*x.shape[:-1], out)


def block_layer(weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> nn.Module:
    """A layer of blocks: torch's own kernel where it is, gathered products elsewhere."""
    if weight.is_cuda:
        from torch.utils._triton import has_triton

        if has_triton():
            return BsrLinear(weight, bias, rows, columns)
    return BlockLinear(weight, bias, rows, columns)


class LowRankLinear(nn.Module):
    """The product of two thin factors, [out, rank] and [rank, in]."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.left = nn.Parameter(left.detach().clone(), requires_grad=False)
        self.right = nn.Parameter(right.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(functional.linear(x, self.right), self.left, self.bias)


@cache
def fused(work: Work) -> Work:
    """Elementwise work as one kernel, where torch can write kernels for a GPU (which takes Triton)."""
    return torch.compile(work, dynamic=True) if find_spec("triton") else work


class Int8Linear(nn.Module):
    """Products of 8-bit whole numbers, summed exactly; the input becomes bytes over the range it has now.

    It computes what ONNX's DynamicQuantizeLinear and MatMulInteger do. The product wants signed bytes on
    both sides, so the input's are moved down by 128, and what that changes is a constant of each output.
    """

    codes: Tensor
    step: Tensor
    sums: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, step: Tensor, bias: Tensor | None) -> None:
        """[out, in] int8 codes and [out] steps, in float32."""
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("step", step.float())
        self.register_buffer("sums", codes.float().sum(1))
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        flat = x.reshape(-1, x.shape[-1])
        low, high = torch.aminmax(flat)
        to_bytes: Work = fused(_to_bytes) if x.is_cuda else _to_bytes
        from_sums: Work = fused(_from_sums) if x.is_cuda else _from_sums
        q, step, shift = to_bytes(flat, low, high)
        if len(q) < LEAST_ROWS:
            q = functional.pad(q, (0, 0, 0, LEAST_ROWS - len(q)))
        total = torch._int_mm(q, self.codes.t())[: len(flat)]
        y: Tensor = from_sums(total, shift, self.sums, step, self.step, self.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def _to_bytes(flat: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed bytes of an input, their step, and how far they are above the code of zero."""
    step, zero = fakequant.affine(low.float(), high.float())
    codes = (flat.float() / step).clamp(-zero, fakequant.BYTE - zero).round()
    shift = MIDDLE - zero
    return (codes - shift).to(torch.int8), step, shift


def _from_sums(
    total: Tensor, shift: Tensor, sums: Tensor, step: Tensor, steps: Tensor, bias: Tensor | None
) -> Tensor:
    """What sums of products of codes stand for."""
    y = (total.float() + shift * sums) * (step * steps)
    return y if bias is None else y + bias


class Fp8Linear(nn.Module):
    """Products of 8-bit floating-point numbers (e4m3), one step for the weight and one for the input."""

    codes: Tensor
    step: Tensor
    read: Tensor

    def __init__(self, codes: Tensor, step: float, read: float, bias: Tensor | None) -> None:
        """[out, in] float8 codes; `step` is that of the weight, `read` that of the input.

        Raises:
            CompressError: the GPU multiplies no such numbers.
        """
        super().__init__()
        if codes.is_cuda:
            _capable("fp8 products", FP8_CAPABILITY)
        self.register_buffer("codes", codes)
        self.register_buffer("step", torch.tensor(step, device=codes.device))
        self.register_buffer("read", torch.tensor(read, device=codes.device))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        flat = x.reshape(-1, x.shape[-1])
        q = (fused(_to_floats) if x.is_cuda else _to_floats)(flat, self.read)
        y = torch._scaled_mm(q, self.codes.t(), scale_a=self.read, scale_b=self.step, out_dtype=x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def _to_floats(flat: Tensor, step: Tensor) -> Tensor:
    """An input in e4m3; values outside the range become the largest number of it."""
    return (flat.float() / step).clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)


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
    kept = norms.argsort(dim=1, descending=True, stable=True)[:, : quota(norms.shape[1], density)]
    mask = torch.zeros_like(norms, dtype=torch.bool).scatter_(1, kept, True)
    return (tiles * mask[:, None, :, None]).reshape(out, inner)


@dataclass(frozen=True)
class Kernel:
    """How torch runs the products of an option on a GPU.

    Attributes:
        rows, columns: what the sizes of a weight [out, in] must be multiples of.
        timed: a layer with weights that no kernel can tell from real ones, for timing.
        deploy: a layer from what a compressed weight was made of (codes, factors or nothing) and the layer
            that holds its bias; CompressError where the device has no such product.
    """

    rows: int
    columns: int
    timed: Callable[[nn.Linear], nn.Module]
    deploy: Callable[[Any, nn.Linear], nn.Module]


def kernel_of(option: Option) -> Kernel | None:
    """The kernel of an option, None where torch has none for it; options of two moves have none."""
    own = [move for move in formats.implementations() if move.applies(option)]
    return own[0].torch_kernel(option) if len(own) == 1 else None


def required_kernel(form: str) -> Kernel:
    """The kernel of a form.

    Raises:
        CompressError: torch has none.
    """
    found = kernel_of(Option.of(form, None))
    if found is None:
        raise CompressError(f"torch has no product of {form} on a GPU")
    return found


def convert(model: nn.Module, form: str, names: Iterable[str] | None = None) -> list[str]:
    """Replace linear layers of `model` by the form, in place; the names of those that it does not fit.

    Args:
        model: on the device where it will run.
        form: as `ir.Option.form` states it.
        names: modules to replace; all linear layers unless given.
    """
    kernel = required_kernel(form)
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    left = []
    for name in found if names is None else names:
        layer = found[name]
        out, inner = layer.weight.shape
        if out % kernel.rows or inner % kernel.columns:
            left.append(name)
            continue
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, kernel.timed(layer))
    return left
