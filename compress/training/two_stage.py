"""Two-stage training of plans that prune and quantize: the plan in floating point, then quantized.

The pruned model is first trained in floating point with the dense model as its teacher. It then becomes the
teacher of the quantized model, which starts from its weights: the quantized model has the same shapes and so
can match every hidden state. Late layers that stayed far from the dense model in the first stage get a
smaller weight in the second (`distillation.layer_factors`).

Reference: Yu et al., "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization",
arXiv 2305.10727, sections 3.2 and 3.3.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from compress.core import ranges
from compress.core.fakequant import Quantized
from compress.formats import FLOAT, number_format
from compress.ir import Option, Site
from compress.methods import quantized_layers
from compress.recipe import Recovery
from compress.sites.modeling import owner
from compress.sites.prune import Removal
from compress.tasks.loading import Batch, Task

EPOCHS_SHARE, RATE_SHARE = 0.5, 0.4  # of the second stage, as shares of the first
MAX_MOMENT_BYTES = 2**30  # limit for the second moments held at a time
STATISTICS_BATCHES = 32  # batches for the input statistics of quantized layers


def applies(sites: Sequence[Site], removals: Mapping[str, Removal], *, narrow: bool = False) -> bool:
    """Whether a plan both prunes and quantizes.

    Args:
        sites: of the original model.
        removals: by site name.
        narrow: whether the hidden width is smaller than the teacher's.
    """
    units = {site.name: site.units for site in sites}
    sparse = any(
        len(one.kept) < units[name] or _float_form(one.form) != "dense" for name, one in removals.items()
    )
    return (sparse or narrow) and any(_is_quantized(one) for one in removals.values())


def float_stage(removals: Mapping[str, Removal]) -> dict[str, Removal]:
    """The plan without quantization, for `prune.shrink`: the student of the first stage.

    Readers without a pattern or factors get the dense model's own weights; all other weights have their
    dequantized values.
    """
    found = dict(removals)
    for name, one in removals.items():
        if _is_quantized(one):
            form = _float_form(one.form)
            readers = {} if form == "dense" else one.readers
            found[name] = replace(one, form=form, readers=readers, codes={})
    return found


def second_stage_settings(wanted: Recovery) -> Recovery:
    """Settings of the second stage: the same losses for fewer epochs at a lower rate."""
    changes = {"epochs": math.ceil(EPOCHS_SHARE * wanted.epochs), "rate": RATE_SHARE * wanted.rate}
    return wanted.model_copy(update=changes)


@torch.no_grad()
def quantize_model(
    task: Task,
    model: nn.Module,
    sites: Sequence[Site],
    removals: Mapping[str, Removal],
    batches: Sequence[Batch],
) -> dict[str, Removal]:
    """Quantize a tuned float model as a plan says, in place; the removals with the new codes.

    Codes minimize the output error on the inputs of the layers in this model, and input ranges minimize the
    squared error. Exact zeros stay zero.

    Args:
        task: of the model that was pruned; not changed.
        model: with plain layers; its weights become the dequantized weights, and biases correct the mean.
        sites: of the original model.
        removals: of the quantized plan.
        batches: calibration inputs.
    """
    places: dict[str, tuple[str, quantized_layers.Place]] = {}
    wanted = {site.name: removals[site.name] for site in sites if site.name in removals}
    names = {
        weight: (name, Option.of(one.form, None).precision)
        for name, one in wanted.items()
        if _is_quantized(one)
        for weight in one.codes
    }
    seeing = copy.copy(task)
    seeing.model = model
    for group in _groups(model, list(names)):
        for weight, seen in quantized_layers.observe(seeing, group, batches).items():
            name, precision = names[weight]
            span = (
                ranges.span(seen.histogram, "mse") if number_format(precision).range == "calibrated" else None
            )
            layer = model.get_submodule(owner(weight))
            assert isinstance(layer, nn.Linear)
            place, _ = quantized_layers.round_linear(layer, precision, seen.second, seen.mean, span=span)
            places[weight] = name, place
    codes: dict[str, dict[str, Quantized]] = {}
    for weight, (name, place) in places.items():
        layer = model.get_submodule(owner(weight))
        layer.get_parameter("weight").copy_(place.quantized.weight())
        if place.bias is not None:
            layer.get_parameter("bias").copy_(place.bias)
        codes.setdefault(name, {})[weight] = place.quantized
    return {name: replace(one, codes=codes.get(name, one.codes)) for name, one in removals.items()}


def _is_quantized(removal: Removal) -> bool:
    found = Option.of(removal.form, None).number_format
    return bool(removal.codes) and found is not None and found.trainable


def _float_form(form: str) -> str:
    """The option without quantization."""
    return Option.of(form, None).model_copy(update={"precision": FLOAT}).form


def _groups(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Groups of weights whose input moments fit in memory together; one pass each."""
    group: list[str] = []
    held = 0
    for name in names:
        size = 8 * model.get_parameter(name).shape[1] ** 2
        if group and held + size > MAX_MOMENT_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
