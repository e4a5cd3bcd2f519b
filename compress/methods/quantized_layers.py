"""Linear layers that emulate low-precision products, for scoring and for quantization-aware training.

`insert` replaces an `nn.Linear` by such a layer and `remove` restores the original. The layer is itself an
`nn.Linear` with the same parameter names, so surrounding code works unchanged. Its weight is the dequantized
weight. A trainable layer quantizes its weight in every forward pass, and gradients of the weight and of the
steps pass through the rounding (straight-through). A step is trained as the logarithm of its relative
change: under Adam, whose update size does not follow the gradient, every step then changes by the same
factor and none becomes negative (Jain et al., "Trained Quantization Thresholds", arXiv 1903.08066).
`finalize` ends the training: plain layers with rounded weights, and the codes for the exporter.

A layer of a masked model still reads units that the exported file lacks. `columns` lists the remaining ones;
the others do not count for the input range, pairs of neighbors or blocks.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibration.activation_statistics import real_rows
from compress.core import fakequant, gptq
from compress.core.fakequant import Quantized, grid_of
from compress.core.ranges import Histogram
from compress.core.units import index_of
from compress.errors import CompressError
from compress.formats import move_of_format, number_format
from compress.ir import Site
from compress.sites.modeling import owner
from compress.sites.prune import Removal, kept_positions
from compress.tasks.loading import Batch, Task

LEAST_STEP = 1e-9  # lower bound of a learned step


@dataclass(frozen=True, eq=False)
class Place:
    """The quantized weight of one layer, its new bias [out] or None, and the kept columns or None for all."""

    quantized: Quantized
    bias: Tensor | None = None
    columns: Tensor | None = None


@dataclass(frozen=True)
class InputMoments:
    """Statistics of a layer's input: `E[x x^T]` [in, in], `E[x]` [in], and a histogram of its values."""

    second: Tensor
    mean: Tensor
    histogram: Histogram


class QuantizedLinear(nn.Linear):
    """A linear layer [out, in] whose output is that of its product in low precision.

    In training `change` [out, blocks] and, for int8-static, `input_change` are log(current / initial step).
    """

    step: Tensor
    input_step: Tensor
    change: nn.Parameter
    input_change: nn.Parameter

    def __init__(self, dense: nn.Linear, place: Place, *, learn: bool = False) -> None:
        nn.Module.__init__(self)
        found = place.quantized
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.precision: str = found.precision
        self.format = number_format(found.precision)
        self.grid = grid_of(found.precision)
        self.columns = place.columns
        self.learn = learn
        self.original = (dense,)  # in a tuple, so that it is no part of this module
        weight = found.weight()
        if place.columns is not None:
            weight = torch.zeros(weight.shape[0], dense.in_features).index_copy(1, place.columns, weight)
        self.weight = nn.Parameter(weight.to(dense.weight), requires_grad=learn)
        bias = dense.bias if place.bias is None else place.bias.to(dense.weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=learn)
        step = found.step.to(dense.weight)
        self.input_zero = float(found.input_zero)
        input_step = torch.tensor(found.input_step or 0.0, dtype=step.dtype)
        self.register_buffer("step", step, persistent=learn)
        self.register_buffer("input_step", input_step, persistent=learn)
        if learn:
            self.change = nn.Parameter(torch.zeros_like(step))
            if found.input_step is not None:
                self.input_change = nn.Parameter(torch.zeros_like(input_step))
        # Without training the codes are constant.
        self.fixed = None if learn else found.codes.to(dense.weight)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        values, weight = input, self.weight
        if self.columns is not None:
            values, weight = values[..., self.columns], weight[:, self.columns]
        step = self.steps()
        if self.learn:
            step = fakequant.damped_step(step, weight.numel() // step.numel(), self.grid.high)
        codes = fakequant.weight_codes(weight, step, self.grid) if self.fixed is None else self.fixed
        if self.format.range == "blocks":
            return self._blockwise(values, codes * fakequant.spread(step, codes.shape[1], self.grid.block))
        input_step, zero = self._input(values)
        if self.grid.floating:
            read = fakequant.float_codes(values, input_step)
        else:
            read = fakequant.input_codes(values, input_step, zero)
        product = F.linear(read, codes)
        scale = input_step * step[:, 0]
        if self.bias is None:
            return product * scale
        if self.format.rounds_bias:  # the bias is an integer multiple of input_step * step
            return (product + fakequant.rounded(self.bias / scale)) * scale
        return product * scale + self.bias

    def _input(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.format.range == "dynamic":
            return fakequant.dynamic_range(values)
        step = self.input_steps()
        if self.learn:
            step = fakequant.damped_step(step, values.shape[-1], fakequant.BYTE)
        return step, torch.tensor(self.input_zero)

    def steps(self) -> Tensor:
        """The current steps of the weight, [out, blocks]."""
        return (self.step * self.change.exp()).clamp(min=LEAST_STEP) if self.learn else self.step

    def input_steps(self) -> Tensor:
        """The current step of the input, a scalar; only int8-static has one."""
        return (
            (self.input_step * self.input_change.exp()).clamp(min=LEAST_STEP)
            if self.learn
            else self.input_step
        )

    def _blockwise(self, values: Tensor, weight: Tensor) -> Tensor:
        rows = values.reshape(-1, values.shape[-1])
        codes, step = fakequant.block_codes(rows, self.grid.block)
        read = (codes * step).flatten(1)[:, : values.shape[-1]]
        return F.linear(read.reshape(values.shape), weight, self.bias)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The current codes and steps of the kept columns."""
        weight = self.weight if self.columns is None else self.weight[:, self.columns]
        step = self.steps().float()
        codes = fakequant.weight_codes(weight, step, self.grid)
        codes = codes.to(torch.float8_e4m3fn if self.grid.floating else torch.int8)
        if self.format.range not in ("calibrated", "moments"):
            return Quantized(self.precision, codes, step)
        return Quantized(self.precision, codes, step, float(self.input_steps()), int(self.input_zero))


def insert(model: nn.Module, places: Mapping[str, Place], *, learn: bool = False) -> None:
    """Replace linear layers by quantized ones, in place.

    Args:
        model: holds the layers.
        places: by the name of the weight, such as `encoder.0.dense.weight`.
        learn: weights, biases and steps are trainable.

    Raises:
        CompressError: not the weight of an `nn.Linear`, shapes differ, or fp8 is to be trained. The model is
            unchanged then.
    """
    if learn and any(grid_of(place.quantized.precision).floating for place in places.values()):
        raise CompressError(
            "fp8 layers cannot be trained (one step per weight, not learned); tune before rounding"
        )
    layers = {name: _linear(model, name) for name in places}
    for name, layer in layers.items():
        _check(name, layer, places[name])
    for name, layer in layers.items():
        made = move_of_format(places[name].quantized.precision).layer(layer, places[name], learn=learn)
        model.set_submodule(owner(name), made.train(layer.training))


def remove(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Restore the original layers as before `insert`: those of the named weights, or all."""
    found = _inserted(model)
    wanted = set(found) if names is None else {owner(name) for name in names}
    for name in wanted & set(found):
        model.set_submodule(name, found[name].original[0])


def places(model: nn.Module, site: Site, removal: Removal, *, masked: bool) -> dict[str, Place]:
    """The quantized weights of a site, by the name of the weight, ready for `insert`.

    Args:
        model: after `prune.write_weights` (masked) or `prune.shrink`; it is only read.
        site: of the original model.
        removal: its codes; without codes the result is empty.
        masked: the model has its original shape, and removed units are excluded.
    """
    found = {}
    for name, codes in removal.codes.items():
        if not masked:
            found[name] = Place(codes)
        elif name == site.writer:
            found[name] = Place(codes, columns=index_of(site.column, removal.kept))
        else:
            found[name] = Place(_spread(codes, kept_positions(model, site, name, removal.kept), model, name))
    return found


def _spread(codes: Quantized, stay: Tensor, model: nn.Module, name: str) -> Quantized:
    """Codes of the full weight: those of kept outputs, zero for all others."""
    out = len(model.get_parameter(name))
    kept = codes.codes.view(torch.uint8)  # torch has no index_copy for fp8
    whole = kept.new_zeros(out, kept.shape[1]).index_copy_(0, stay, kept).view(codes.codes.dtype)
    step = codes.step.new_ones(out, codes.step.shape[1]).index_copy_(0, stay, codes.step)
    return replace(codes, codes=whole, step=step)


def emulated(model: nn.Module, sites: Iterable[Site], removals: Mapping[str, Removal]) -> nn.Module:
    """A copy of a shrunk model that emulates the low-precision products of its exported file."""
    found = copy.deepcopy(model)
    for site in sites:
        if site.name in removals:
            insert(found, places(found, site, removals[site.name], masked=False))
    return found


def share_input(model: nn.Module, names: Sequence[str]) -> None:
    """Share one trainable input step among int8-static layers that read the same tensor.

    The file quantizes a tensor once for all products with the same step. Separate steps would need one
    quantization per product, whose time is not in the measured latency.
    """
    layers = [_inserted(model)[owner(name)] for name in names]
    for layer in layers[1:]:
        layer.input_change = layers[0].input_change


@contextmanager
def frozen_codes(model: nn.Module) -> Iterator[None]:
    """Quantize the weights of trainable layers once within the context; parameters must not change there."""
    layers = [layer for layer in _inserted(model).values() if layer.learn]
    try:
        for layer in layers:
            layer.fixed = layer.quantized().codes.to(layer.weight)
        yield
    finally:
        for layer in layers:
            layer.fixed = None


@torch.no_grad()
def finalize(model: nn.Module) -> dict[str, Quantized]:
    """Replace every inserted layer by a plain one with rounded weights; the codes by weight name.

    The exported file of this model, lowered with these codes, computes what the inserted layers computed.
    """
    found = {}
    for name, layer in _inserted(model).items():
        quantized = layer.quantized()
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        weight = quantized.weight()
        if layer.columns is not None:
            weight = torch.zeros(layer.weight.shape).index_copy(1, layer.columns, weight)
        plain.weight = nn.Parameter(weight.to(layer.weight))
        plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        model.set_submodule(name, plain.train(layer.training))
        found[f"{name}.weight"] = quantized
    return found


@torch.inference_mode()
def observe(task: Task, names: Iterable[str], batches: Sequence[Batch]) -> dict[str, InputMoments]:
    """Input statistics over calibration data, by the name of the weight; padding is excluded.

    Layers that read the same tensor share one result.

    Raises:
        CompressError: a name is not the weight of an `nn.Linear`, or an input is NaN or infinite.
    """
    layers = {name: _linear(task.model, name) for name in names}
    watch = _Watch()
    hooks = [layer.register_forward_pre_hook(watch.hook(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            watch.begin(batch)
            task.model(**batch.inputs)
    finally:
        for handle in hooks:
            handle.remove()
    made: dict[int, InputMoments] = {}
    found = {}
    for name, total in watch.totals.items():
        if id(total) not in made:
            made[id(total)] = InputMoments(
                total.second / total.count, total.sum / total.count, total.histogram
            )
        found[name] = made[id(total)]
    if set(layers) - set(found):
        skipped = ", ".join(sorted(set(layers) - set(found)))
        raise CompressError(f"{skipped} received no data: the model does not run them on these inputs")
    return found


class _Total:
    """Running sums over one input tensor."""

    def __init__(self, inner: int) -> None:
        self.count = 0
        self.sum = torch.zeros(inner, dtype=torch.float64)
        self.second = torch.zeros(inner, inner, dtype=torch.float64)
        self.histogram = Histogram()

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        self.sum += rows.sum(0, dtype=torch.float64)
        self.second += rows.T @ rows
        self.histogram.add(rows)


class _Watch:
    """Accumulates layer inputs; layers that read the same tensor in the first batch share one total."""

    def __init__(self) -> None:
        self.totals: dict[str, _Total] = {}
        self.batch: Batch | None = None
        self.read: list[tuple[Tensor, _Total]] = []

    def begin(self, batch: Batch) -> None:
        """Start the next batch."""
        self.batch, self.read = batch, []

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A forward pre-hook for the layer of this weight."""

        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            values = arguments[0]
            known = [total for tensor, total in self.read if tensor is values]
            total = self.totals.get(name) or (known[0] if known else _Total(values.shape[-1]))
            self.totals[name] = total
            if any(tensor is values and total is done for tensor, done in self.read):
                return
            self.read.append((values, total))
            assert self.batch is not None
            total.add(real_rows(values, self.batch).float())

        return before


def round_linear(
    layer: nn.Linear,
    precision: str,
    second: Tensor,
    mean: Tensor,
    *,
    span: tuple[float, float] | None = None,
) -> tuple[Place, float]:
    """The layer's weight rounded for inputs with these moments, and its error (0 is lossless).

    With a bias, the error is centered: the bias corrects the mean. Without, it is taken about zero.

    Args:
        layer: not changed.
        precision: number format of its product.
        second: [in, in] `E[x x^T]`, not centered.
        mean: [in] `E[x]`.
        span: the range of the input, for int8-static.
    """
    biased = layer.bias is not None
    found = gptq.quantize(layer.weight.detach(), second, mean if biased else None, precision, span=span)
    bias = (layer.bias.detach().double() + found.shift).to(layer.weight.dtype) if biased else None
    return Place(found.quantized, bias), found.error


def _inserted(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        layer = model.get_submodule(owner(name))
    except AttributeError as error:
        raise CompressError(
            f"{name} is not a weight of the model; the site that lists it is wrong"
        ) from error
    if not isinstance(layer, nn.Linear) or isinstance(layer, QuantizedLinear) or not name.endswith(".weight"):
        raise CompressError(
            f"{name} belongs to a {type(layer).__name__}; only the weight of an nn.Linear in full precision "
            "can be quantized"
        )
    return layer


def _check(name: str, layer: nn.Linear, place: Place) -> None:
    inner = layer.in_features if place.columns is None else len(place.columns)
    if tuple(place.quantized.codes.shape) != (layer.out_features, inner):
        raise CompressError(
            f"{name} is [out={layer.out_features}, in={inner}], its codes are "
            f"{list(place.quantized.codes.shape)}; they belong to another model or site"
        )
