"""What the tests of several modules share: taken out of test_families."""

import functools

import torch

from compress.sites.discovery import find_sites
from compress.sites.prune import Removal
from support import families


@functools.cache
def subject(name):
    """A family with weights that all matter, its sites, and inputs with padding where it takes any."""
    model, example = families.build(name)
    sites = find_sites(model, example).sites
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    inputs = dict(example)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][1, 5:] = 0
    return model, sites, inputs


def tensor_of(output):
    """The tensor that carries quality, whatever the model returns."""
    if isinstance(output, torch.Tensor):
        return output
    for key in ("logits", "last_hidden_state", "out"):
        if key in output:
            return output[key]
    raise AssertionError(f"no known output among {list(output)}")


@torch.inference_mode()
def run(model, inputs):
    """What the model says."""
    return tensor_of(model(**inputs))


def change(model, site, units, seed, bias=True):
    """A removal that keeps `units` random units and gives the writer random columns."""
    generator = torch.Generator().manual_seed(seed)
    out = model.get_parameter(site.writer).shape[1 - site.column.dim]
    kept = torch.randperm(site.units, generator=generator)[:units].sort().values
    weight = 0.2 * torch.randn(out, units * site.column.width, generator=generator)
    return Removal(kept, weight, 0.2 * torch.randn(out, generator=generator) if bias else None)


def changes(model, sites, seed=0, bias=True):
    """Some units of every site, another number each."""
    return {
        site.name: change(model, site, max(1, site.units // 2 - i % 3), seed + i, bias)
        for i, site in enumerate(sites)
    }
