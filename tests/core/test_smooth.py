import pytest
import torch
from torch import nn

from compress.core import smooth
from compress.errors import CompressError


def parts(loud=40.0):
    torch.manual_seed(0)
    norm, first, second = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(16, 8)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
        norm.weight[3] = loud
    return norm, first, second, torch.randn(200, 16)


def moments(x):
    return x.abs().amax(0), x.square().mean(0)


def bytes_of(x):
    """One step for everything, from the largest magnitude."""
    step = 2 * x.abs().max() / 255
    return (x / step).round() * step


def rows_of_bytes(weight):
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def lost(x, weight, exact):
    return float((bytes_of(x) @ rows_of_bytes(weight).T - exact).square().mean())


def test_the_function_stays_and_rounding_loses_less():
    norm, first, second, x = parts()
    inside = norm(x).detach()
    exact = [inside @ layer.weight.T.detach() for layer in (first, second)]
    before = [lost(inside, w.weight.detach(), y) for w, y in zip((first, second), exact, strict=True)]
    divide = smooth.factors(*moments(inside), [first.weight.detach(), second.weight.detach()])
    smooth.move(divide, [norm.weight, norm.bias], [first.weight, second.weight])
    inside = norm(x).detach()
    for layer, y, plain in zip((first, second), exact, before, strict=True):
        assert torch.allclose(inside @ layer.weight.T.detach(), y, atol=1e-4)
        assert lost(inside, layer.weight.detach(), y) < 0.3 * plain


def test_two_products_can_share_channels_too():
    torch.manual_seed(1)
    up, down, x = nn.Linear(6, 10), nn.Linear(10, 4), torch.randn(50, 6)
    before = down(up(x))
    smooth.move(torch.rand(10) + 0.5, [up.weight, up.bias], [down.weight])
    assert torch.allclose(down(up(x)), before, atol=1e-5)


def test_the_estimate_is_never_worse_than_without_and_says_what_rounding_does():
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(500, 12) * torch.randn(12).exp()
        weight = torch.randn(9, 12)
        divide = smooth.factors(*moments(x), [weight])
        plain = smooth.rounding_error(*moments(x), [weight])
        moved = smooth.rounding_error(*moments(x / divide), [weight * divide])
        assert moved <= plain * (1 + 1e-9)
        measured = lost(x, weight, x @ weight.T) * 9
        assert measured == pytest.approx(plain, rel=0.5)


def test_channels_alike_are_left_alone():
    assert smooth.factors(torch.ones(4), torch.ones(4), [torch.ones(2, 4)]).tolist() == [1.0] * 4


def test_silent_channels_and_unread_ones_get_finite_factors():
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight[:, 1] = 0
    divide = smooth.factors(
        torch.tensor([0.0, 1.0, 2.0, 500.0]), torch.tensor([0.0, 1.0, 2.0, 9.0]), [weight]
    )
    assert bool((torch.isfinite(divide) & (divide > 0)).all())


def test_what_does_not_fit_is_refused_before_anything_changes():
    norm, first, _, _ = parts()
    kept = norm.weight.detach().clone()
    with pytest.raises(CompressError, match=r"16 factors do not fit a tensor of shape \(24, 5\)"):
        smooth.move(torch.full((16,), 2.0), [norm.weight], [torch.ones(24, 5)])
    with pytest.raises(CompressError, match="positive"):
        smooth.move(torch.zeros(16), [norm.weight], [first.weight])
    with pytest.raises(CompressError, match="cannot be moved"):
        smooth.factors(torch.ones(3), torch.ones(3), [torch.ones(2, 4)])
    assert torch.equal(norm.weight, kept)
