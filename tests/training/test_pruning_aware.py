from itertools import pairwise

import pytest
import torch
from support.stream_models import built, logits, wide
from torch.nn import functional as F

from compress.core.rotation import principal
from compress.errors import CompressError
from compress.methods.hidden_width import find_stream, narrow
from compress.tasks.task import Batch
from compress.training.pruning_aware import Adapter, HybridRotation, Pruner, Settings, tune

EXACT = 1e-9  # float64
KINDS = ("vit", "gpt2", "opt", "llama", "qwen2", "qwen3")


def pruner_of(name, width=10, *, precise=True, **settings):
    model, example = built(name, precise=precise)
    stream = find_stream(model, example)
    made = Pruner(model, stream, wide(stream), width, Settings(steps=10, hybrid=0.2, **settings))
    return made.eval(), model, example


def shaken(pruner, seed=0):
    """As after long training: nothing at its initial value any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in pruner.named_parameters():
            if not name.startswith("model."):
                value.add_(0.5 * torch.randn(value.shape, generator=generator).to(value))
    return pruner


@pytest.mark.parametrize("name", KINDS)
def test_at_the_first_step_nothing_is_changed(name):
    for adapters in (0, 3):
        pruner, model, example = pruner_of(name, adapters=adapters)
        assert pruner.mask().tolist() == [1.0] * len(pruner.scores)
        assert (logits(pruner, example) - logits(model, example)).abs().max() < EXACT
        assert pruner.identity_loss().item() < 1e-10


@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.parametrize("name", KINDS)
def test_merging_is_exact(name, adapters):
    pruner, model, example = pruner_of(name, adapters=adapters)
    shaken(pruner).at(1.0)
    masked = logits(pruner, example)
    merged = pruner.merge()
    assert type(merged) is type(model)
    assert (logits(merged, example) - masked).abs().max() < EXACT
    assert (masked - logits(model, example)).abs().max() > 1e-2
    first = pruner.stream.writers[0]
    assert merged.get_parameter(first.tensor).shape[first.dim] == 10
    # The same model again: merging takes nothing away from the pruner.
    assert torch.equal(logits(pruner, example), masked)


@pytest.mark.parametrize("forgotten", ["scale", "adapters", "scores"])
def test_a_merge_that_forgets_something_would_show(forgotten):
    pruner, _, example = pruner_of("gpt2", adapters=3)
    shaken(pruner).at(1.0)
    masked = logits(pruner, example)
    with torch.no_grad():
        for name, value in pruner.named_parameters():
            if not name.startswith("model.") and f"{name}.".find(forgotten) >= 0:
                value.copy_(value.flip(0) if forgotten == "scores" else torch.zeros_like(value))
    assert (logits(pruner.merge(), example) - masked).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_what_is_masked_stays_zero_through_the_network(name):
    pruner, _, example = pruner_of(name)
    shaken(pruner).at(1.0)
    seen = []
    for norm in pruner.stream.norms:
        pruner.model.get_submodule(norm.module).register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
    logits(pruner, example)
    gone = pruner.basis[:, pruner.mask() == 0]
    assert len(seen) == len(pruner.stream.norms)
    assert max(float((rows @ gone).abs().max()) for rows in seen) < EXACT
    assert min(float((rows @ pruner.basis).abs().max()) for rows in seen) > 1e-2


def test_layer_norm_over_uncentered_directions_would_not_be_the_model():
    pruner, model, example = pruner_of("vit")
    stream = pruner.stream.model_copy(update={"centered": False})
    other = Pruner(model, stream, wide(stream), 10, pruner.settings).eval()
    shaken(other).at(1.0)
    assert (logits(other.merge(), example) - logits(other, example)).abs().max() > 1e-2


def test_the_mask_of_every_step_has_its_exact_budget_and_hardens():
    pruner, _, _ = pruner_of("llama", hard=0.25)
    shaken(pruner)
    sums = []
    for step in range(101):
        pruner.at(step / 100)
        mask = pruner.mask()
        sums.append(mask.sum().item())
        if step >= 75:
            assert set(mask.tolist()) == {0.0, 1.0}
            assert not mask.requires_grad
            assert pruner.is_hard
        elif step:
            assert mask.requires_grad
    assert sums[0] == 24
    assert all(a >= b - 1e-9 for a, b in pairwise(sums))
    assert sums[75:] == [10.0] * 26


def test_the_mask_starts_from_the_directions_that_carry_least():
    pruner, _, _ = pruner_of("llama")
    pruner.at(0.4)
    mask = pruner.mask()
    assert bool((mask.diff() <= 0).all())
    second = wide(pruner.stream)
    _, moments = principal(second, centered=False)
    energy = (pruner.basis.T @ second @ pruner.basis).diagonal()
    assert torch.allclose(energy, moments)


def lesson(pruner_inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (2,), generator=generator)
    return Batch(pruner_inputs, labels)


def cross_entropy(model, batch):
    return F.cross_entropy(model(**batch.inputs).logits, batch.labels)


def test_zero_rates_give_the_plain_narrow_model():
    pruner, model, example = pruner_of("vit", learning_rate=0.0, score_rate=0.0)
    second = wide(pruner.stream)
    merged = tune(pruner, [lesson(example)] * 10, cross_entropy)
    expected = logits(narrow(model, pruner.stream, second, 10), example)
    assert (logits(merged, example) - expected).abs().max() < EXACT


@pytest.mark.parametrize("adapters", [0, 2])
def test_tuning_learns_and_what_it_returns_is_what_was_tuned(adapters):
    pruner, model, example = pruner_of("vit", adapters=adapters, precise=False)
    pruner.settings = Settings(steps=30, adapters=adapters, learning_rate=1e-2)
    batch, losses, calls = lesson(example), [], []

    def loss(net, batch):
        value = cross_entropy(net, batch)
        losses.append(float(value.detach()))
        return value

    start = cross_entropy(narrow(model, pruner.stream, wide(pruner.stream), 10), batch)
    merged = tune(pruner, [batch] * 30, loss, lambda done, total: calls.append((done, total)))
    assert (merged.training, merged.config.hidden_size) == (False, 10)
    assert cross_entropy(merged, batch).item() < 0.5 * start.item()
    assert float((logits(merged, example) - logits(pruner.eval(), example)).abs().max()) < 1e-4
    assert calls[-1] == (30, 30)
    frozen = [
        bool((a == b).all()) for a, b in zip(pruner.model.parameters(), model.parameters(), strict=True)
    ]
    assert all(frozen) == bool(adapters)
    assert pruner.identity_loss().item() < 1.0


def test_scores_learn_while_the_mask_is_soft_and_rest_when_it_is_hard():
    pruner, _, example = pruner_of("vit", precise=False)
    before, after = pruner.scores.detach().clone(), []

    def loss(net, batch):
        if net.is_hard:
            after.append(net.scores.detach().clone())
        return cross_entropy(net, batch)

    tune(pruner, [lesson(example)] * 10, loss)
    assert len(after) == 2
    assert not torch.equal(after[0], before)
    assert torch.equal(after[-1], pruner.scores.detach())


def test_gradients_are_clipped():
    pruner, _, example = pruner_of("vit", precise=False)
    pruner.settings = Settings(steps=2, hard=0.1, clip=1e-3)
    tune(pruner, [lesson(example)] * 2, cross_entropy)
    given = [value.grad.norm() for value in pruner.parameters() if value.grad is not None]
    assert torch.stack(given).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_rates_follow_their_line_and_only_the_models_weights_decay():
    pruner, _, example = pruner_of("vit")
    pruner.settings = Settings(steps=4, learning_rate=0.1, decay=0.5, warmup=0.5, identity=0.0)
    before = {name: value.detach().clone() for name, value in pruner.named_parameters()}

    def still(net, batch):
        return sum((value * 0.0).sum() for value in net.parameters())

    tune(pruner, [lesson(example)] * 4, still)
    left = 1.0
    for share in (1 / 2, 1.0, 1.0, 1 / 2):  # a rise over two steps, then a line down
        left *= 1 - 0.1 * share * 0.5
    for name, value in pruner.named_parameters():
        kept = left if name.startswith("model.") else 1.0
        assert torch.allclose(value, kept * before[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_identity_loss_alone_brings_parts_back_to_orthonormal(weight):
    pruner, _, example = pruner_of("vit", precise=False)
    shaken(pruner)
    pruner.settings = Settings(steps=20, learning_rate=2e-2, identity=weight)
    before = pruner.identity_loss().item()
    tune(pruner, [lesson(example)] * 20, lambda net, batch: sum((p * 0.0).sum() for p in net.parameters()))
    after = pruner.identity_loss().item()
    assert after < 0.5 * before if weight else after == before


def test_every_hybrid_module_counts_in_the_identity_loss():
    pruner, _, _ = pruner_of("llama")
    with torch.no_grad():
        for hybrid in pruner.hybrids.values():
            hybrid.inward.mul_(2.0)
    rank = next(iter(pruner.hybrids.values())).inward.shape[0]
    assert pruner.identity_loss().item() == pytest.approx(9 * rank * len(pruner.hybrids))
    assert len(pruner.hybrids) == len(pruner.stream.writers)


def test_a_layers_weight_and_bias_share_a_module():
    pruner, _, _ = pruner_of("vit")
    biased = sum(part.tensor.endswith(".bias") for part in pruner.stream.writers)
    assert biased
    assert len(pruner.hybrids) == len(pruner.stream.writers) - biased


def test_parts_start_as_they_are_said_to():
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(HybridRotation(8, 2, generator).matrix(), torch.eye(8))
    adapter = Adapter(torch.Size([4, 6]), 9, 2.0, generator)
    assert adapter.right.shape == (4, 6)
    assert not adapter().any()
    with torch.no_grad():
        adapter.left.fill_(1.0)
    assert torch.allclose(adapter(), 2.0 * torch.ones(4, 4) @ adapter.right)


def test_what_cannot_be_done_is_said():
    pruner, model, example = pruner_of("vit")
    with pytest.raises(CompressError, match="still soft"):
        pruner.merge()
    with pytest.raises(CompressError, match="needs 10 batches, the data gave 3"):
        tune(pruner, [lesson(example)] * 3, cross_entropy)
    with pytest.raises(CompressError, match="loss of step 1 is nan"):
        tune(pruner, [lesson(example)] * 10, lambda net, batch: cross_entropy(net, batch) * torch.nan)
    with pytest.raises(CompressError, match="between 2 and 20"):
        Pruner(model, pruner.stream, wide(pruner.stream), 21, pruner.settings)
