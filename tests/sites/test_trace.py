"""That a mask made by broadcasting is the mask that `torch.vmap` makes."""

import sys
from types import SimpleNamespace

import pytest
import torch

from compress.sites.trace import _broadcast, plain_attention

PADDING = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
INDICES = (torch.arange(2), torch.arange(1), torch.arange(2, 5), torch.arange(5))


def causal(batch, head, query, key):
    return key <= query


def window(batch, head, query, key):
    return (key <= query) & (key > query - 2)


@pytest.mark.parametrize("function", [causal, window])
def test_broadcasting_gives_what_mapping_gives(function):
    mapped = function
    for dims in (
        (None, None, None, 0),
        (None, None, 0, None),
        (None, 0, None, None),
        (0, None, None, None),
    ):
        mapped = torch.vmap(mapped, in_dims=dims)
    assert torch.equal(_broadcast(function)(*INDICES), mapped(*INDICES))


def test_a_mask_may_look_up_the_padding_of_each_input():
    mask = _broadcast(lambda batch, head, query, key: PADDING[batch, key])(*INDICES)
    assert mask.shape == (2, 1, 3, 5)
    for b in range(2):
        for q in range(3):
            assert torch.equal(mask[b, 0, q], PADDING[b])


def test_a_mask_without_batch_and_heads_has_two_dimensions():
    mask = _broadcast(causal)(None, None, *INDICES[2:])
    assert mask.tolist() == [[k <= q for k in range(5)] for q in range(2, 5)]


def test_the_sizes_of_a_mask_stay_free_in_a_trace():
    class Model(torch.nn.Module):
        def forward(self, x):
            batch, tokens = torch.arange(x.shape[0]), torch.arange(x.shape[1])
            return _broadcast(causal)(batch, torch.arange(1), tokens, tokens)

    free = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    program = torch.export.export(Model(), (torch.ones(2, 7),), dynamic_shapes=free)
    assert program.module()(torch.ones(3, 9)).shape == (3, 1, 9, 9)


def test_the_masks_of_transformers_are_as_before_afterwards(monkeypatch):
    masks = SimpleNamespace(_vmap_for_bhqkv=causal, TransformGetItemToIndex=window)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", masks)

    def meet_an_error():
        with plain_attention(), masks.TransformGetItemToIndex():
            assert masks._vmap_for_bhqkv is _broadcast
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        meet_an_error()
    assert masks == SimpleNamespace(_vmap_for_bhqkv=causal, TransformGetItemToIndex=window)
