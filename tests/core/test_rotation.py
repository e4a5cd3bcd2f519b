import pytest
import torch
from torch.nn import functional as F

from compress.core.rotation import along, cosines, narrowing, principal, read_through, through_ones
from compress.errors import CompressError

ATOL = 1e-10
LARGE_EPSILON = 0.7  # of the size of the stream, so that a wrong epsilon cannot hide


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(width, seed=0):
    rows = random(4 * width, width, seed=seed) * torch.linspace(3, 0.1, width, dtype=torch.float64) + 0.5
    return rows.T @ rows / len(rows)


def rms(x, gamma, epsilon):
    return gamma * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


@pytest.mark.parametrize("width", [1, 2, 3, 8, 33])
def test_cosines_are_orthonormal_and_all_but_the_first_have_mean_zero(width):
    frame = cosines(width)
    assert torch.allclose(frame.T @ frame, torch.eye(width, dtype=torch.float64), atol=ATOL)
    assert frame[:, 1:].sum(0).abs().max() < ATOL if width > 1 else frame.tolist() == [[1.0]]


@pytest.mark.parametrize("centered", [False, True])
def test_principal_directions_are_those_of_the_singular_values(centered):
    rows = random(50, 7) * torch.arange(1, 8) + 1.0
    basis, moments = principal(rows.T @ rows / 50, centered=centered)
    seen = rows - rows.mean(-1, keepdim=True) if centered else rows
    _, values, directions = torch.linalg.svd(seen / 50**0.5, full_matrices=False)
    count = basis.shape[1]
    assert count == 7 - centered
    assert torch.allclose(moments, values[:count].square(), atol=1e-9)
    assert torch.allclose(
        (directions[:count] @ basis).abs(), torch.eye(count, dtype=torch.float64), atol=1e-8
    )


def test_principal_directions_lose_the_least():
    second = second_moment(9)
    basis, moments = principal(second, centered=False)
    kept = basis[:, :4]
    lost = second.trace() - (kept.T @ second @ kept).trace()
    assert torch.isclose(lost, moments[4:].sum())
    for seed in range(20):
        other = torch.linalg.qr(random(9, 4, seed=seed)).Q
        assert second.trace() - (other.T @ second @ other).trace() >= lost - ATOL


@pytest.mark.parametrize("width", [12, 9, 2])
def test_narrowing_keeps_the_chosen_directions_and_their_length(width):
    for centered in (False, True):
        basis, _ = principal(second_moment(12), centered=centered)
        made = narrowing(basis, width, centered=centered)
        kept = basis[:, : width - centered]
        x = random(5, 12)
        seen = x @ kept @ kept.T
        new = x @ made.down.T
        assert made.down.shape == (width, 12)
        assert torch.allclose(new @ made.up.T, seen, atol=ATOL)
        # The mean square over n is that of the masked stream over d: epsilon need not change.
        assert torch.allclose(new.square().mean(-1), seen.square().mean(-1), atol=ATOL)


@pytest.mark.parametrize("width", [12, 9, 3])
def test_layer_norm_of_the_narrow_stream_is_that_of_the_masked_stream(width):
    basis, _ = principal(second_moment(12), centered=True)
    made = narrowing(basis, width, centered=True)
    x, gamma, beta = random(6, 12), random(12, seed=1), random(12, seed=2)
    weight, bias = random(4, 12, seed=3), random(4, seed=4)
    kept = basis[:, : width - 1]
    expected = F.layer_norm(x @ kept @ kept.T, (12,), gamma, beta, LARGE_EPSILON) @ weight.T + bias
    narrow, gained = read_through(weight, made.up, gamma, beta)
    plain = F.layer_norm(x @ made.down.T, (width,), None, None, LARGE_EPSILON)
    assert torch.allclose(plain @ narrow.T + bias + gained, expected, atol=ATOL)
    ones = torch.ones(width, dtype=torch.float64)
    shifted = F.layer_norm(x @ made.down.T, (width,), ones, ones, LARGE_EPSILON)
    assert torch.allclose(shifted @ through_ones(narrow, gained).T + bias, expected, atol=ATOL)
    # What has a bias of its own is not moved by the constant channel.
    assert torch.allclose(shifted @ narrow.T + bias + gained, expected, atol=ATOL)


def test_layer_norm_at_full_width_is_the_original():
    basis, _ = principal(second_moment(12), centered=True)
    made = narrowing(basis, 12, centered=True)
    x, gamma, beta, weight = random(6, 12), random(12, seed=1), random(12, seed=2), random(4, 12, seed=3)
    expected = F.layer_norm(x, (12,), gamma, beta, LARGE_EPSILON) @ weight.T
    narrow, gained = read_through(weight, made.up, gamma, beta)
    plain = F.layer_norm(x @ made.down.T, (12,), None, None, LARGE_EPSILON)
    assert torch.allclose(plain @ narrow.T + gained, expected, atol=ATOL)


@pytest.mark.parametrize("width", [12, 9, 1])
def test_rms_norm_of_the_narrow_stream_is_that_of_the_masked_stream(width):
    basis, _ = principal(second_moment(12), centered=False)
    made = narrowing(basis, width, centered=False)
    x, gamma, weight = random(6, 12), random(12, seed=1), random(4, 12, seed=3)
    kept = basis[:, :width]
    expected = rms(x @ kept @ kept.T, gamma, LARGE_EPSILON) @ weight.T
    narrow, gained = read_through(weight, made.up, gamma, None)
    assert torch.allclose(rms(x @ made.down.T, 1.0, LARGE_EPSILON) @ narrow.T, expected, atol=ATOL)
    assert gained.tolist() == [0.0] * 4


@pytest.mark.parametrize("centered", [False, True])
def test_without_the_scale_a_large_epsilon_shows(centered):
    basis, _ = principal(second_moment(12), centered=centered)
    made = narrowing(basis, 6, centered=centered)
    scale = 0.5**0.5
    x = random(6, 12)
    if centered:
        right = F.layer_norm(x @ made.down.T, (6,), eps=LARGE_EPSILON) @ made.up.T
        wrong = F.layer_norm(x @ made.down.T / scale, (6,), eps=LARGE_EPSILON) @ made.up.T
    else:
        right = rms(x @ made.down.T, 1.0, LARGE_EPSILON) @ made.up.T
        wrong = rms(x @ made.down.T / scale, 1.0, LARGE_EPSILON) @ made.up.T
    assert (right - wrong).abs().max() > 1e-2


def test_layer_norm_without_centered_directions_differs():
    basis, _ = principal(second_moment(12), centered=False)
    made = narrowing(basis, 12, centered=False)
    x = random(6, 12)
    there_and_back = F.layer_norm(x @ made.down.T, (12,)) @ made.up.T
    assert (there_and_back - F.layer_norm(x, (12,))).abs().max() > 1e-2


def test_along_applies_a_matrix_to_one_dimension():
    matrix, value = random(3, 5), random(2, 5, 4, seed=1)
    expected = torch.einsum("no,aob->anb", matrix, value)
    assert torch.allclose(along(matrix, value, 1), expected, atol=ATOL)


def test_impossible_widths_and_moments_are_refused():
    basis, _ = principal(second_moment(12), centered=True)
    with pytest.raises(CompressError, match="between 2 and 12"):
        narrowing(basis, 13, centered=True)
    with pytest.raises(CompressError, match="between 2 and 12"):
        narrowing(basis, 1, centered=True)
    with pytest.raises(CompressError, match="NaN"):
        principal(torch.full((3, 3), torch.nan), centered=False)
