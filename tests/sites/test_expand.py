import pytest
import torch
from support import families
from support.family_changes import change, changes, run, subject

from compress.sites.expand import expand
from compress.sites.prune import Removal, shrink

ATOL = 1e-5  # two orders of summing a few dozen float32 products near 1


def kept(removals):
    return {name: removal.kept for name, removal in removals.items()}


def tuned(model):
    """The same model after some training."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", families.NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_expanded_model_says_what_the_small_one_says(name, bias):
    model, sites, inputs = subject(name)
    removals = changes(model, sites, bias=bias)
    small = tuned(shrink(model, sites, removals))
    big = expand(model, sites, kept(removals), small)
    assert (run(big, inputs) - run(small, inputs)).abs().max() <= ATOL
    assert (run(big, inputs) - run(model, inputs)).abs().max() > 1e-3
    own = dict(model.named_parameters())
    assert all(value.shape == own[key].shape for key, value in big.named_parameters() if key in own)
    gained = {key for key, _ in big.named_parameters()} - set(own)
    assert gained == ({key for key, _ in small.named_parameters()} - set(own))


@pytest.mark.parametrize("name", families.NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_dropped_site_comes_back_as_a_constant(name, bias):
    model, sites, inputs = subject(name)
    for site in sites:
        if site.drop is not None:
            removals = changes(model, sites, bias=bias) | {site.name: change(model, site, 0, 0, bias)}
            small = tuned(shrink(model, sites, removals))
            big = expand(model, sites, kept(removals), small)
            assert (run(big, inputs) - run(small, inputs)).abs().max() <= ATOL, site.name


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_shrinking_the_expanded_model_to_what_was_kept_gives_the_small_one_back(name):
    model, sites, _ = subject(name)
    removals = changes(model, sites)
    small = tuned(shrink(model, sites, removals))
    big = expand(model, sites, kept(removals), small)
    again = shrink(big, sites, {key: Removal(value) for key, value in kept(removals).items()})
    wanted = small.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())


def test_nothing_removed_is_a_copy_with_the_new_weights():
    model, sites, inputs = subject("bert")
    small = tuned(shrink(model, sites, {}))
    assert torch.equal(run(expand(model, sites, {}, small), inputs), run(small, inputs))
