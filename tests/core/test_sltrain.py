import pytest
import torch

from compress.core import sltrain
from compress.errors import CompressError


def parts(out=5, inner=7, rank=2, density=0.4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mask = sltrain.random_mask(out, inner, density, generator)
    places = sltrain.places_of(mask)
    left = torch.randn(out, rank, generator=generator, dtype=dtype, requires_grad=True)
    right = torch.randn(rank, inner, generator=generator, dtype=dtype, requires_grad=True)
    values = torch.randn(int(mask.sum()), generator=generator, dtype=dtype, requires_grad=True)
    return mask, places, left, right, values


def plain(x, left, right, values, mask):
    """The dense expression, for autograd to differentiate."""
    sparse = torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, values)
    return x @ (left @ right + sparse).T


@pytest.fixture(params=[1, 15, 2**20])
def chunk(request, monkeypatch):
    """From one row at a time to all at once."""
    monkeypatch.setattr(sltrain, "CHUNK", request.param)
    return request.param


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_forward_and_all_gradients_are_those_of_the_dense_expression(shape):
    mask, places, left, right, values = parts()
    x = torch.randn(*shape, 7, dtype=torch.float64, requires_grad=True)
    own = sltrain.product(x, left, right, values, places)
    reference = plain(x, left, right, values, mask)
    assert torch.allclose(own, reference, atol=1e-14, rtol=1e-12)
    weights = torch.randn_like(own)
    found = torch.autograd.grad((own * weights).sum(), (x, left, right, values))
    expected = torch.autograd.grad((reference * weights).sum(), (x, left, right, values))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-13, rtol=1e-12)


@pytest.mark.usefixtures("chunk")
def test_the_backward_pass_is_that_of_finite_differences():
    _, places, left, right, values = parts()
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *inputs: sltrain.product(*inputs, places), (x, left, right, values)
    )


def test_only_what_is_asked_for_gets_a_gradient():
    _, places, left, right, values = parts()
    x = torch.randn(3, 7, dtype=torch.float64)
    sltrain.product(x, left, right.detach(), values, places).sum().backward()
    assert left.grad is not None
    assert values.grad is not None
    assert right.grad is None
    frozen = values.detach()
    x.requires_grad_()
    sltrain.product(x, left.detach(), right, frozen, places).sum().backward()
    assert x.grad is not None
    assert right.grad is not None


def test_no_dense_tensor_is_saved_and_none_outlives_a_piece(monkeypatch):
    monkeypatch.setattr(sltrain, "CHUNK", 2 * 64)
    _, places, left, right, values = parts(48, 64, 2, 0.1)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    saved, made = [], []
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                made.append(found.numel())
            return found

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = sltrain.product(x, left, right, values, places)
        with Watch():
            y.sum().backward()
    assert max(saved) < 48 * 64 / 4
    assert max(made) < 48 * 64 / 4
    # The control: autograd on the dense expression makes and saves the whole weight.
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[torch.repeat_interleave(places.pointers.diff()), places.columns.long()] = True
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        plain(x, left, right, values, mask)
    assert max(saved) == 48 * 64


@pytest.mark.usefixtures("chunk")
def test_a_second_derivative_is_refused_instead_of_wrong():
    _, places, left, right, values = parts()
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    y = sltrain.product(x, left, right, values, places).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# Places


def test_places_name_the_mask_and_take_two_bytes_where_they_can():
    mask = sltrain.random_mask(6, 9, 0.3, torch.Generator().manual_seed(0))
    mask[2] = False
    places = sltrain.places_of(mask)
    for row in range(6):
        own = places.columns[places.pointers[row] : places.pointers[row + 1]]
        assert own.tolist() == mask[row].nonzero()[:, 0].tolist()
    assert places.columns.dtype == torch.int16
    assert sltrain.places_of(torch.ones(1, 2**15, dtype=torch.bool)).columns.max() == 2**15 - 1
    wide = sltrain.places_of(torch.ones(1, 2**15 + 1, dtype=torch.bool))
    assert wide.columns.dtype == torch.int32
    assert wide.columns.max() == 2**15


def test_random_places_are_as_many_as_asked_different_and_repeatable():
    first = sltrain.random_mask(30, 40, 0.0333, torch.Generator().manual_seed(1))
    again = sltrain.random_mask(30, 40, 0.0333, torch.Generator().manual_seed(1))
    other = sltrain.random_mask(30, 40, 0.0333, torch.Generator().manual_seed(2))
    assert int(first.sum()) == int(0.0333 * 1200)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_chosen_places_are_the_best_and_as_many():
    score = torch.rand(30, 40, generator=torch.Generator().manual_seed(3))
    mask = sltrain.chosen_mask(score, 0.0333)
    assert int(mask.sum()) == int(0.0333 * 1200)
    assert float(score[mask].min()) > float(score[~mask].max())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_densities_out_of_range_are_refused(density):
    with pytest.raises(CompressError, match="above 0 and at most 1"):
        sltrain.random_mask(4, 4, density)


def test_training_starts_from_the_sparse_part_alone_within_its_bounds():
    places = sltrain.places_of(sltrain.random_mask(64, 100, 0.5))
    left, right, values = sltrain.initial(64, 100, 8, places, torch.Generator().manual_seed(0))
    assert bool((left == 0).all())
    for part in (right, values):
        assert 0.09 < float(part.abs().max()) <= 0.1
        assert abs(float(part.mean())) < 0.01
    assert right.shape == (8, 100)
    assert values.shape == places.columns.shape


# Memory


def test_the_account_is_what_adam_really_holds():
    _, places, left, right, values = parts(48, 64, 4, 0.1, dtype=torch.float32)
    optimizer = torch.optim.Adam([left, right, values])
    sltrain.product(torch.randn(3, 64), left, right, values, places).sum().backward()
    optimizer.step()
    made = sltrain.account(48, 64, 4, 0.1)
    trained = (left, right, values)
    assert made.parameters == sum(part.numel() for part in trained) == 4 * (48 + 64) + int(0.1 * 48 * 64)
    assert made.weight_bytes == sum(part.nbytes for part in trained)
    assert made.gradient_bytes == sum(part.grad.nbytes for part in trained)
    states = [optimizer.state[part][key] for part in trained for key in ("exp_avg", "exp_avg_sq")]
    assert made.optimizer_bytes == sum(state.nbytes for state in states)
    assert made.index_bytes == places.columns.nbytes + places.pointers.nbytes
    assert made.held_bytes < 0.35 * sltrain.dense_account(48, 64).held_bytes


@pytest.mark.parametrize(("out", "inner"), [(48, 64), (40, 2000), (3, 10**6)])
def test_beside_what_lasts_there_are_two_pieces_of_dense_rows(out, inner, monkeypatch):
    monkeypatch.setattr(sltrain, "CHUNK", 10**5)
    height = max(1, min(out, 10**5 // inner))
    assert sltrain.account(out, inner, 4, 0.1).temporary_bytes == 2 * 4 * height * inner
    assert sltrain.dense_account(out, inner).temporary_bytes == 0


def test_low_rank_alone_holds_no_index_and_narrow_types_less():
    assert sltrain.account(64, 64, 4, 0.0).index_bytes == 0
    full = sltrain.dense_account(64, 64, item_bytes=2, state_bytes=1)
    assert full.held_bytes == 64 * 64 * (2 + 2 + 2)
    assert sltrain.account(64, 2**15 + 1, 4, 0.01).index_bytes == 4 * int(0.01 * 64 * (2**15 + 1)) + 8 * 65


@pytest.mark.parametrize(
    ("hidden", "inner", "layers", "rank", "vocabulary", "published"),
    [
        (512, 1376, 8, 128, 32000, 43.5),
        (768, 2048, 12, 256, 32000, 96.5),
        (1024, 2736, 24, 256, 32000, 194.2),
    ],
)
def test_whole_models_count_the_published_parameters(hidden, inner, layers, rank, vocabulary, published):
    # LLaMA of 60M, 130M and 350M with density 0.03: seven products a layer, two embeddings, the norms.
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    products = layers * sum(sltrain.account(*shape, rank, 0.03).parameters for shape in shapes)
    total = products + 2 * vocabulary * hidden + (2 * layers + 1) * hidden
    assert total / 1e6 == pytest.approx(published, abs=0.1)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("hold", [False, True])
def test_beside_a_weight_that_stays_they_are_those_of_the_dense_expression_too(hold):
    mask, places, left, right, values = parts()
    base = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    base[torch.rand(5, 7, generator=torch.Generator().manual_seed(4)) < 0.5] = 0
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    own = sltrain.product(x, left, right, values, places, base, hold=hold)
    stays = (base != 0).double() if hold else torch.ones_like(base)
    sparse = torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, values)
    weight = base + stays * (left @ right) + sparse
    reference = x @ weight.T
    assert torch.allclose(own, reference, atol=1e-13, rtol=1e-12)
    merged = sltrain.merged(left, right, values, places, base, hold=hold)
    assert torch.allclose(merged, weight, atol=1e-14, rtol=1e-12)
    weights = torch.randn_like(own)
    found = torch.autograd.grad((own * weights).sum(), (x, left, right, values))
    expected = torch.autograd.grad((reference * weights).sum(), (x, left, right, values))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-13, rtol=1e-12)


def test_held_to_the_zeros_of_a_weight_the_factors_alone_change_none_of_them():
    _, places, left, right, values = parts()
    base = torch.eye(5, 7, dtype=torch.float64)
    kept = sltrain.merged(left, right, 0 * values, places, base, hold=True)
    assert torch.equal(kept == 0, base == 0)
    assert int((sltrain.merged(left, right, 0 * values, places, base) == 0).sum()) == 0
