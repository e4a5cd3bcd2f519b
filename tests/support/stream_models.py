"""What the tests of several modules share: taken out of test_residual."""

import copy

import torch
from torch import nn

from compress.core.rotation import principal
from support import families
from support.toys import lively


def double(model):
    """In float64 throughout: transformers' own RMSNorm computes in float32."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            own = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            own.weight = module.weight
            model.set_submodule(name, own)
    return model.double()


def built(name, *, precise=False):
    model, example = families.build(name)
    model = lively(model)
    if precise:
        model = double(model)
        example = {k: v.double() if v.is_floating_point() else v for k, v in example.items()}
    return model, example


def logits(model, example):
    with torch.no_grad():
        answer = model(**example)
    return answer if isinstance(answer, torch.Tensor) else answer.logits


def wide(stream, seed=0):
    rows = torch.randn(3 * stream.width, stream.width, generator=torch.Generator().manual_seed(seed)).double()
    return rows.T @ rows


def projected(model, stream, second, width):
    """The oracle: at full shape, every writer projected on the directions that stay; nothing else touched."""
    basis, _ = principal(second, centered=stream.centered)
    kept = basis[:, : width - stream.centered]
    masked = copy.deepcopy(model)
    with torch.no_grad():
        seen = set()
        for part in stream.writers:
            value = masked.get_parameter(part.tensor)
            if value.data_ptr() in seen:
                continue
            seen.add(value.data_ptr())
            own = (value.double().movedim(part.dim, -1) @ kept @ kept.T).movedim(-1, part.dim)
            for reader in stream.readers:  # tied: the side that reads keeps its values
                if masked.get_parameter(reader.weight) is value:
                    place, _, last = reader.weight.rpartition(".")
                    setattr(masked.get_submodule(place), last, nn.Parameter(value.detach().clone()))
            value.copy_(own)
    return masked
