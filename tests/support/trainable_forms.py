"""What the tests of several modules share: taken out of test_learning."""

import pytest
import torch

from compress import profiles
from compress.calibration import activation_statistics
from compress.export.backends.onnx_file import OnnxRuntimeCpu
from compress.ir import Option
from compress.methods import apply, candidate_store
from compress.search import objective
from compress.sites import prune
from support.classifier import Padded, padded


class Bare(Padded):
    """The same data without labels."""

    labelled = False


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """A function that gives the model in a form, shrunk to a share of its units, and its removals."""
    folder = tmp_path_factory.mktemp("candidates")
    task, sites = padded()
    backend = OnnxRuntimeCpu(profiles.load("cpu"), 1)
    activation_statistics.collect(
        task, sites, list(task.batches("calibration", 16)), folder / "s", spans=True
    )

    def build(form, share=0.5):
        place = folder / f"{form} {share}".replace(":", "-")
        options = {}
        for site in sites:
            units = apply.levels(site, form, [int(site.units * share)], backend) or [None]
            options[site.name] = Option.of(form, units[0])
        candidate_store.build(
            task.model, sites, folder / "s", {name: [one] for name, one in options.items()}, place
        )
        removals = {
            site.name: candidate_store.removal(place, index, options[site.name])
            for index, site in enumerate(sites)
        }
        return prune.shrink(task.model, sites, removals), removals

    return build


def away(task, model):
    """Divergence from the dense model on its data."""
    batches = list(task.batches("test", 16))
    return objective.mean_divergence(
        task, model, batches, objective.compute_logits(task, task.model, batches)
    )


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def equal(first, second):
    """Codes, steps and factors of two sets of removals are the same bits."""
    for name, one in first.items():
        other = second[name]
        for key, found in one.codes.items():
            assert torch.equal(found.codes, other.codes[key].codes)
            assert torch.equal(found.step, other.codes[key].step)
            assert found.input_step == other.codes[key].input_step
        for key, parts in one.factors.items():
            assert all(map(torch.equal, parts, other.factors[key]))
