"""A model without the units that were removed from it: this module is also the file beside its weights.

It needs torch alone, so that the model loads where `compress` is not installed. `reduce` takes a freshly
built model and a record of sites, and makes every tensor as small as the record says; the values come
from the weights afterwards. A module that lost all its units is replaced by a stand-in, which returns
the bias of its last matrix.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CACHES = ("past_key_values", "past_key_value", "cache")  # names of the key-value cache over the years


class Form(Protocol):
    """What a dropped module returned: the hidden state at `output` of a tuple of `outputs`, or alone."""

    @property
    def output(self) -> int | None:
        """Position of the hidden state; None when the module returns nothing else."""

    @property
    def outputs(self) -> int:
        """Length of the tuple."""


class Drop:
    """The form of a dropped module, as a record words it."""

    def __init__(self, words: Mapping[str, Any]) -> None:
        self.output, self.outputs = words["output"], words["outputs"]


class Bias(nn.Module):
    """Stands where a writer was whose inputs are all gone: its bias, for every token."""

    def __init__(self, features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.features = features
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., features], whatever the last dimension of `hidden` is."""
        shape = (*hidden.shape[:-1], self.features)
        if self.bias is None:
            return hidden.new_zeros(shape)
        # A copy, because the code around may add to it in place; exporters remove it.
        return self.bias.expand(shape).clone()


class Dropped(nn.Module):
    """Stands where a module was that lost every unit, and returns outputs of the same structure.

    With a `bias` the writer was inside, and its bias is returned. Without, the writer lies outside and
    is a `Bias`, which reads no values: one column of the input tells it the number of tokens.
    """

    def __init__(self, drop: Form, bias: Bias | None, layer: int | None) -> None:
        super().__init__()
        self.output, self.outputs = drop.output, drop.outputs
        self.inner = bias
        self.layer = layer

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor | None, ...]:
        """The hidden state, alone or in its place of the tuple; the other places hold None."""
        hidden = _hidden(args, kwargs)
        self._remember(hidden, next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None))
        value = hidden[..., :1] if self.inner is None else self.inner(hidden)
        if self.output is None:
            return value
        return tuple(value if place == self.output else None for place in range(self.outputs))

    def _remember(self, hidden: Tensor, cache: object) -> None:
        """Tell a key-value cache of the tokens: models ask its first layer how many there were."""
        cache = getattr(cache, "self_attention_cache", cache)
        update = getattr(cache, "update", None)
        if self.layer is not None and update is not None:
            seen = hidden[:, None, :, :1]  # [batch, 1 head, tokens, 1]
            update(seen, seen, self.layer)


def reduce(model: nn.Module, record: Iterable[Mapping[str, Any]]) -> None:
    """Give a model of the original architecture the shapes of the compressed one, in place.

    Args:
        model: freshly built; may be on the meta device. Contents of what stays mean nothing afterwards.
        record: `sites` under the key `compression` of config.json: each with its `site`, the `units` it
            keeps, and whether its writer has `gained_bias`.

    Raises:
        ValueError: the record names a part that the model has not.
    """
    kept = [(entry["site"], entry["units"], entry["gained_bias"]) for entry in record]
    for site, _, _ in kept:
        for name in (site["writer"], *(part["tensor"] for part in site["slices"])):
            _tensor(model, name)
    for site, units, _ in kept:
        if 0 < units < site["units"]:
            _cut(model, site, units)
    for site, _, gained in kept:
        if gained:  # as wide as the hidden width is by now
            writer = model.get_submodule(owner(site["writer"]))
            writer.bias = nn.Parameter(_tensor(model, site["writer"]).new_zeros(_width(model, site)))
    for site, units, _ in kept:
        if units == 0:
            _drop(model, site)
    restate_widths(model)


def owner(name: str) -> str:
    """The dotted name of the module that holds the tensor `name`."""
    return name.rpartition(".")[0]


def set_count(holder: object, attribute: str, value: int) -> None:
    """Set an integer attribute of `holder`; `attribute` may be dotted, as in `config.num_heads`.

    An object on the way (a configuration) is usually shared by every layer, so `holder` gets a copy of
    its own first.
    """
    *path, last = attribute.split(".")
    for step in path:
        own = copy.copy(getattr(holder, step))
        setattr(holder, step, own)
        holder = own
    setattr(holder, last, value)


def replace(model: nn.Module, drop: Form, module: str, writer: str | None, bias: Bias) -> None:
    """Put a stand-in where `module` was; one of its own where the `writer` was, if that lies outside."""
    old = model.get_submodule(module)
    layer = getattr(old, "layer_idx", None)
    stand_in = Dropped(drop, bias if writer is None else None, layer if type(layer) is int else None)
    if writer is not None:
        model.set_submodule(writer, bias.train(old.training))
    model.set_submodule(module, stand_in.train(old.training))


def restate_widths(model: nn.Module) -> None:
    """Make what layers say about their width true; those of transformers' Conv1D are nf and nx."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.out_channels = module.weight.shape[0]
        elif type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
            for attribute, width in zip(("nx", "nf"), module.weight.shape, strict=True):
                setattr(module, attribute, width)


def _cut(model: nn.Module, site: Mapping[str, Any], units: int) -> None:
    """Shorten every tensor of a site, and set its counts."""
    seen: set[tuple[int, int, int]] = set()
    for part in site["slices"]:
        value, dim = _tensor(model, part["tensor"]), part["dim"]
        if (id(value), dim, part["start"]) in seen:
            continue
        seen.add((id(value), dim, part["start"]))
        size = value.shape[dim] - (site["units"] - units) * part["width"]
        # The tensor object stays, only its contents change: whatever shares it keeps sharing it.
        value.data = torch.narrow(value.detach(), dim, 0, size).clone()
    for count in site["counts"]:
        set_count(model.get_submodule(count["module"]), count["attribute"], units * count["per_unit"])
    _restate_heads(model, site, units)


def _restate_heads(model: nn.Module, site: Mapping[str, Any], units: int) -> None:
    """Update the head counts that transformers' attention keeps.

    Since 5, BERT and DistilBERT read their number off the tensors, so a record that was made there names no
    counts; in 4 they compute with attributes.
    """
    heads = site.get("queries", 1)
    width = heads * site.get("head_dim", 0)
    for part in site["slices"]:
        module = model.get_submodule(owner(owner(part["tensor"])))
        if not type(module).__module__.startswith("transformers."):
            continue
        for pair in (("num_attention_heads", "all_head_size"), ("n_heads", "dim")):
            stated = [getattr(module, attribute, None) for attribute in pair]
            if stated == [site["units"] * heads, site["units"] * width]:
                setattr(module, pair[0], units * heads)
                setattr(module, pair[1], units * width)


def _drop(model: nn.Module, site: Mapping[str, Any]) -> None:
    """Put stand-ins where the module of a site was, and where its writer was."""
    drop, writer = site["drop"], owner(site["writer"])
    bias = Bias(_width(model, site), model.get_submodule(writer).bias)  # type: ignore[arg-type]
    replace(model, Drop(drop), drop["module"], None if drop["writer"] else writer, bias)


def _width(model: nn.Module, site: Mapping[str, Any]) -> int:
    """Output features of a site's writer."""
    column: int = next(part["dim"] for part in site["slices"] if part["tensor"] == site["writer"])
    return _tensor(model, site["writer"]).shape[1 - column]


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    try:
        value = getattr(model.get_submodule(owner(name)), name.rpartition(".")[2])
    except AttributeError as error:
        raise ValueError(
            f"config.json says that units were removed from {name!r}, which this {type(model).__name__} has "
            "not; versions of transformers name parts differently: install the one that config.json states "
            "under transformers_version"
        ) from error
    assert isinstance(value, Tensor)
    return value


def _hidden(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """The hidden state among the arguments of a module: the first tensor, or `hidden_states`."""
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ValueError("a module that was dropped is called without any tensor; keep one of its units")
