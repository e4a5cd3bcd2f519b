"""A causal model with its key-value cache as one ONNX file, for the prompt and for every token after it.

Inputs are `input_ids`, `attention_mask` over past and new tokens, `position_ids` where the model takes
them, and `past_key_values.<layer>.key` and `.value` [batch, heads, past, width]; outputs are the logits
and `present.<layer>.key` and `.value`, which are the past of the next step: optimum's names. An empty
past is a prompt. Every layer has a cache of its own, which shrinks with its key-value heads; a layer
whose attention was dropped has none. The cache keeps all tokens, also those that a window hides.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from compress.errors import CompressError
from compress.export.onnx.kv_cache import IDS, MASK, PAST, POSITIONS, present
from compress.export.onnx.writer import Exported, Lower, write
from compress.sites.modeling import CACHES, Dropped

BATCH, TOKENS, BEFORE = 2, 3, 5  # sizes of the example, unlike one another
WHOLE = "past + tokens"
Width = tuple[int, int]  # heads, and features of one
PARTS = ("key", "value")


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is without types here
    """The cache of one layer; without tensors it only counts what the layer gives it."""

    def __init__(self, past: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self.past, self.keys, self.values = past, keys, values
        self.is_initialized = True
        self.widths: tuple[Width, Width] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far."""
        self.past += keys.shape[-2]
        self.widths = (keys.shape[1], keys.shape[-1]), (values.shape[1], values.shape[-1])
        if self.keys is None or self.values is None:
            return keys, values
        self.keys = torch.cat([self.keys, keys], dim=-2)
        self.values = torch.cat([self.values, values], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """How many tokens were seen."""
        return self.past


class _Cached(nn.Module):
    """The model with positional tensors: ids, mask, positions where it takes them, then every cache."""

    def __init__(self, model: nn.Module, layers: int, cached: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers, self.cached = layers, cached
        self.positions = takes_positions(model)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Logits, then keys and values of every layer that keeps them."""
        (ids, mask), rest = tensors[:2], tensors[2:]
        more = {POSITIONS: rest[0]} if self.positions else {}
        past = rest[len(more) :]
        seen = past[0].shape[2] if past else mask.shape[1] - ids.shape[1]
        for part in past:
            _same(part.shape[2], seen)
        _same(mask.shape[1], seen + ids.shape[1])
        pairs = dict(zip(self.cached, zip(past[::2], past[1::2], strict=True), strict=True))
        layers = [_Layer(seen, *pairs.get(number, ())) for number in range(self.layers)]
        output = _run(self.model, {IDS: ids, MASK: mask, **more}, layers)
        held = [part for number in self.cached for part in (layers[number].keys, layers[number].values)]
        return (output.logits, *held)


def takes_cache(model: nn.Module) -> bool:
    """Whether a model works with a key-value cache of transformers."""
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return isinstance(layers, int) and _argument(model) is not None


def takes_positions(model: nn.Module) -> bool:
    """Whether the file of a model has an input of positions."""
    return POSITIONS in inspect.signature(model.forward).parameters


def widths(model: nn.Module) -> dict[int, tuple[Width, Width]]:
    """Heads and features of the keys, and of the values, that each layer caches.

    Raises:
        CompressError: the model takes no cache.
    """
    if not takes_cache(model):
        raise CompressError(
            f"{type(model).__name__} takes no key-value cache ({', '.join(CACHES)}), so it cannot decode "
            "token by token; export it as a plain model"
        )
    layers = [_Layer(0) for _ in range(_layers(model))]
    ones = torch.ones(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        _run(model, {IDS: ones, MASK: ones}, layers)
    counted = {module.layer for module in model.modules() if isinstance(module, Dropped)}
    return {
        number: layer.widths
        for number, layer in enumerate(layers)
        if layer.widths is not None and number not in counted
    }


@torch.inference_mode()
def stepper(model: nn.Module, prompt: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """A call that gives the logits of one more token after a prompt; its cache stays as long as it was.

    It runs the model as the exported file does: a cache of its own for every layer, copied to where one
    more token fits.

    Args:
        model: in evaluation mode, where the prompt lies.
        prompt: ids and mask, [batch, tokens]; the last token of each is what comes once more.

    Raises:
        CompressError: the model takes no cache.
    """
    cached, count = widths(model), _layers(model)
    ids, mask = prompt[IDS], prompt[MASK]
    dtype = next(model.parameters()).dtype
    empty = {
        number: tuple(ids.new_zeros((len(ids), heads, 0, width), dtype=dtype) for heads, width in pair)
        for number, pair in cached.items()
    }
    layers = [_Layer(0, *empty.get(number, ())) for number in range(count)]
    _run(model, {IDS: ids, MASK: mask, **_positions(model, mask, ids.shape[1])}, layers)
    held = [(layer.past, layer.keys, layer.values) for layer in layers]
    longer = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    new = {IDS: ids[:, -1:].clone(), MASK: longer, **_positions(model, longer, 1)}

    def step() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = _run(model, new, [_Layer(*parts) for parts in held]).logits
        return logits

    return step


def _positions(model: nn.Module, mask: Tensor, tokens: int) -> dict[str, Tensor]:
    """How many real tokens stand before each of the last ones, where the model takes that."""
    if not takes_positions(model):
        return {}
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    return {POSITIONS: counted[:, mask.shape[1] - tokens :]}


def export(
    model: nn.Module, path: Path, *, output_name: str = "logits", lower: Lower | None = None
) -> Exported:
    """Write a causal model of transformers, dense or shrunk, to `path`.

    A size of the cache that a reader of config.json would guess otherwise (fewer heads in one layer) is
    left free in the inputs: such readers start with an empty past of the size that they guess, which
    onnxruntime accepts. The outputs state every size.

    Args:
        model: its mode is as before afterwards.
        path: appears whole or not at all.
        output_name: the name of the logits.
        lower: changes the finished graph before it is written (see `lowering.lower`).

    Raises:
        CompressError: the model takes no cache, or cannot be exported.
    """
    cached = widths(model)
    guess = _guess(model)
    example: dict[str, Tensor] = {
        IDS: torch.ones(BATCH, TOKENS, dtype=torch.int64),
        MASK: torch.ones(BATCH, BEFORE + TOKENS, dtype=torch.int64),
    }
    free = {IDS: {0: "batch", 1: "tokens"}, MASK: {0: "batch", 1: WHOLE}}
    if takes_positions(model):
        example[POSITIONS] = torch.arange(BEFORE, BEFORE + TOKENS).repeat(BATCH, 1)
        free[POSITIONS] = free[IDS]
    loose: dict[str, dict[int, str]] = {}
    for number, pair in cached.items():
        for part, (heads, width) in zip(PARTS, pair, strict=True):
            name = f"{PAST}{number}.{part}"
            example[name] = torch.zeros(BATCH, heads, BEFORE, width)
            free[name] = {0: "batch", 2: "past"}
            sizes = {1: (heads, guess[0], "heads"), 3: (width, guess[1], "width")}
            loose[name] = {
                dim: f"{word}.{number}" for dim, (size, guessed, word) in sizes.items() if size != guessed
            }
    outputs = [output_name, *(present(name) for name in example if name.startswith(PAST))]
    answer = _Cached(model, _layers(model), tuple(cached))
    return write(answer, example, path, outputs=outputs, dynamic=free, loose=loose, lower=lower)


def _same(size: int, other: int) -> None:
    """Tell the tracer that two free sizes are one."""
    torch._check(size == other)  # type: ignore[no-untyped-call]  # one of torch's methods without types


def _run(model: nn.Module, inputs: Mapping[str, Tensor], layers: list[_Layer]) -> Any:
    """What the model says to new tokens; `layers` hold those before, and then all."""
    name = _argument(model)
    return model(**inputs, **{str(name): Cache(layers=layers)}, use_cache=True)


def _argument(model: nn.Module) -> str | None:
    """The name of the cache among the model's arguments."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in parameters), None)


def _layers(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.num_hidden_layers)


def _guess(model: nn.Module) -> Width:
    """Heads and features of the caches as config.json lets readers guess them."""
    config: Any = model.config
    heads = int(config.num_attention_heads)
    return int(getattr(config, "num_key_value_heads", None) or heads), int(config.hidden_size) // heads
