"""What the tests of several modules share: taken out of test_residual."""

import torch
from torch import nn

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
