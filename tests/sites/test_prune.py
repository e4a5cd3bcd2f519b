import copy
import hashlib

import pytest
import torch
from support.surgery_models import (
    FUSED,
    MODELS,
    TIED,
    Fused,
    Tied,
    bert,
    bert_sites,
    llama,
    llama_sites,
    logits,
    removal,
    rows,
    some_removals,
    tokens,
)
from torch import nn

from compress.errors import CompressError
from compress.ir import Count, Drop, Site, Slice
from compress.sites.modeling import Bias, Dropped
from compress.sites.prune import (
    Removal,
    check,
    mask,
    parameters_after,
    restore,
    shrink,
    shrink_in_place,
    take_snapshot,
    write_weights,
)

# Two orders of summing a few dozen float32 products of size one.
ATOL = 1e-5


@pytest.fixture(scope="module", params=MODELS)
def subject(request):
    build, sites = MODELS[request.param]
    return build(), sites()


@pytest.fixture(scope="module")
def bert_model():
    return bert()


@pytest.fixture(scope="module")
def llama_model():
    return llama()


def fingerprint(model):
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(name.encode())
        total.update(value.numpy().tobytes())
    for name, module in model.named_modules():
        plain = sorted((k, v) for k, v in vars(module).items() if isinstance(v, int | float | str))
        total.update(f"{name} {type(module)} {plain}".encode())
    return total.hexdigest()


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_masked_model_computes_what_the_shrunk_model_computes(subject, weight, bias):
    model, sites = subject
    removals = some_removals(model, sites, weight=weight, bias=bias)
    masked = logits(mask(model, sites, removals))
    assert (masked - logits(shrink(model, sites, removals))).abs().max() <= ATOL
    assert (masked - logits(model)).abs().max() > 1e-2


def test_a_removal_of_nothing_changes_no_bit(subject):
    model, sites = subject
    everything = {site.name: Removal(kept=torch.arange(site.units)) for site in sites}
    assert torch.equal(logits(shrink(model, sites, everything)), logits(model))
    assert torch.equal(logits(shrink(model, sites, {})), logits(model))


def test_neither_mask_nor_shrink_touches_the_model(subject):
    model, sites = subject
    before = fingerprint(model)
    removals = some_removals(model, sites)
    removals[sites[0].name] = removal(model, sites[0], [])
    mask(model, sites, removals)
    shrink(model, sites, removals)
    assert fingerprint(model) == before


def test_a_mask_writes_exactly_the_writer(bert_model):
    site = bert_sites()[0]
    change = removal(bert_model, site, [1, 3])
    masked = mask(bert_model, [site], {site.name: change}).state_dict()
    for name, value in bert_model.state_dict().items():
        if name not in (site.writer, site.bias):
            assert torch.equal(masked[name], value), name
    for unit, columns in ((1, slice(0, 8)), (3, slice(8, 16))):
        stored = masked[site.writer][:, unit * 8 : unit * 8 + 8]
        assert torch.equal(stored, change.weight[:, columns])
    for unit in (0, 2):
        assert masked[site.writer][:, unit * 8 : unit * 8 + 8].abs().max() == 0
    assert torch.equal(masked[site.bias], change.bias)


def test_a_shrunk_model_holds_the_rows_and_columns_that_stay(bert_model):
    site = bert_sites()[0]
    change = removal(bert_model, site, [1, 3])
    before, after = bert_model.state_dict(), shrink(bert_model, [site], {site.name: change}).state_dict()
    stay = [8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31]
    for part in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            name = f"bert.encoder.layer.0.attention.self.{part}.{kind}"
            assert torch.equal(after[name], before[name][stay])
    assert torch.equal(after[site.writer], change.weight)
    assert torch.equal(after[site.bias], change.bias)
    assert list(after) == list(before)


def test_layers_and_counts_say_their_new_width(bert_model):
    sites = bert_sites()
    removals = {
        "0.heads": removal(bert_model, sites[0], [2]),
        "1.ffn": removal(bert_model, sites[3], [5, 6, 7]),
    }
    shrunk = shrink(bert_model, sites, removals).bert.encoder.layer
    first, second = shrunk[0].attention, shrunk[1]
    assert (first.self.num_attention_heads, first.self.all_head_size) == (1, 8)
    assert (first.self.query.in_features, first.self.query.out_features) == (32, 8)
    assert (first.output.dense.in_features, first.output.dense.out_features) == (8, 32)
    assert (second.intermediate.dense.out_features, second.output.dense.in_features) == (3, 3)
    assert second.attention.self.num_attention_heads == 4


def test_sites_may_come_as_a_mapping(bert_model):
    sites = bert_sites()
    removals = some_removals(bert_model, sites)
    named = {site.name: site for site in sites}
    assert torch.equal(logits(mask(bert_model, named, removals)), logits(mask(bert_model, sites, removals)))


def test_a_writer_without_a_bias_gains_one_and_loses_it_when_restored(llama_model):
    site = llama_sites()[1]
    model = copy.deepcopy(llama_model)
    before, tensors = fingerprint(model), take_snapshot(model, site)
    assert tensors.bias is None
    write_weights(model, site, removal(model, site, [0, 9]))
    assert model.model.layers[0].mlp.down_proj.bias.shape == (32,)
    again = removal(model, site, [3], seed=4)
    write_weights(model, site, again)
    assert torch.equal(model.model.layers[0].mlp.down_proj.bias.detach(), again.bias)
    restore(model, site, tensors)
    assert model.model.layers[0].mlp.down_proj.bias is None
    assert fingerprint(model) == before


def test_a_restored_writer_is_the_dense_one_bit_for_bit(subject):
    model, sites = subject
    copied = copy.deepcopy(model)
    before = fingerprint(copied)
    tensors = {site.name: take_snapshot(copied, site) for site in sites}
    for site in sites:
        write_weights(copied, site, removal(copied, site, [1]))
    assert fingerprint(copied) != before
    for site in sites:
        restore(copied, site, tensors[site.name])
    assert fingerprint(copied) == before


def test_only_a_linear_layer_gains_a_bias():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

    model = nn.Sequential(nn.Linear(3, 4), Scale())
    site = Site(
        name="s",
        kind="ffn",
        units=4,
        slices=(*rows("0", 1), Slice(tensor="1.weight", dim=1, width=1)),
        writer="1.weight",
    )
    change = Removal(kept=torch.tensor([1]), bias=torch.ones(3))
    with pytest.raises(CompressError, match=r"Scale without a bias.*make it an nn.Linear"):
        mask(model, [site], {"s": change})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_dropped_site_leaves_what_its_mask_leaves(subject, place, bias):
    model, sites = subject
    removals = {sites[place].name: removal(model, sites[place], [], weight=False, bias=bias)}
    masked = logits(mask(model, sites, removals))
    shrunk = shrink(model, sites, removals)
    assert (masked - logits(shrunk)).abs().max() <= ATOL
    assert (masked - logits(model)).abs().max() > 1e-2
    removed = sites[place].drop.module
    assert isinstance(shrunk.get_submodule(removed), Dropped)


def test_a_post_norm_model_keeps_the_norm_of_residual_plus_bias(bert_model):
    site = bert_sites()[1]
    change = removal(bert_model, site, [])
    shrunk = shrink(bert_model, [site], {site.name: change})
    layer = shrunk.bert.encoder.layer[0]
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    expected = layer.output.LayerNorm(hidden + change.bias)
    assert torch.allclose(layer.feed_forward_chunk(hidden), expected, atol=1e-6)


def test_a_model_without_any_unit_still_runs(subject):
    model, sites = subject
    removals = {site.name: removal(model, site, [], seed=i) for i, site in enumerate(sites)}
    masked, shrunk = mask(model, sites, removals), shrink(model, sites, removals)
    assert (logits(masked) - logits(shrunk)).abs().max() <= ATOL


def test_a_site_without_a_stand_in_is_never_emptied(bert_model):
    site = bert_sites()[0].model_copy(update={"drop": None})
    with pytest.raises(CompressError, match=r"0\.heads: all 4 units are to go.*keep 1 unit"):
        shrink(bert_model, [site], {site.name: removal(bert_model, site, [])})
    with pytest.raises(CompressError, match="keep 1 unit"):
        parameters_after(bert_model, [site], {site.name: 0})


def test_a_decoder_generates_the_same_after_its_first_attention_is_dropped(llama_model):
    sites = llama_sites()
    removals = {sites[0].name: removal(llama_model, sites[0], [])}
    ids = tokens()["input_ids"][:1]
    keywords = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    told = [
        build(llama_model, sites, removals).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **keywords
        )
        for build in (mask, shrink)
    ]
    assert told[0].shape == (1, 15)
    assert torch.equal(told[0], told[1])


def test_a_stand_in_answers_in_the_form_of_the_module_it_replaces():
    hidden = torch.randn(2, 3, 4)
    bias = nn.Parameter(torch.arange(5.0))
    drop = Drop(module="m", writer=True, output=1, outputs=3)
    answer = Dropped(drop, Bias(5, bias), None)("unused", hidden_states=hidden, mask=torch.ones(1))
    assert answer[0] is None
    assert answer[2] is None
    assert torch.equal(answer[1], torch.arange(5.0).expand(2, 3, 5))
    alone = Dropped(Drop(module="m", writer=True), Bias(5, None), None)(query=hidden)
    assert torch.equal(alone, torch.zeros(2, 3, 5))
    counted = Dropped(Drop(module="m", writer=False), None, None)(hidden)
    assert counted.shape[:-1] == (2, 3)
    with pytest.raises(ValueError, match="without any tensor"):
        Dropped(drop, Bias(5, bias), None)("unused")


def test_what_a_stand_in_gives_may_be_added_to_in_place():
    bias = nn.Parameter(torch.zeros(4))
    with torch.no_grad():
        answer = Bias(4, bias)(torch.ones(2, 3, 7))
        answer += 1
    assert torch.equal(bias.detach(), torch.zeros(4))
    assert torch.equal(answer, torch.ones(2, 3, 4))


def test_the_bias_of_a_dropped_site_can_be_trained(bert_model):
    site = bert_sites()[1]
    shrunk = shrink(bert_model, [site], {site.name: removal(bert_model, site, [])})
    shrunk(**tokens()).logits.sum().backward()
    assert shrunk.get_parameter(site.bias).grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_a_stand_in_has_the_mode_of_the_module_that_it_replaces(bert_model, training):
    site = bert_sites()[1]
    model = bert_model.train(training)
    shrunk = shrink(model, [site], {site.name: removal(model, site, [])})
    assert {module.training for module in shrunk.modules()} == {training}
    bert_model.eval()


@pytest.mark.parametrize("kept", [[0], [1], [2], [0, 2], [1, 2]])
def test_a_fused_projection_is_cut_in_every_segment_at_once(kept):
    torch.manual_seed(0)
    model = Fused().eval()
    change = {"fused": removal(model, FUSED, kept)}
    hidden = torch.randn(2, 5, 6)
    masked, shrunk = mask(model, [FUSED], change), shrink(model, [FUSED], change)
    assert shrunk.qkv.weight.shape == (2 + 6 * len(kept), 6)
    assert shrunk.heads == len(kept)
    assert torch.allclose(masked(hidden), shrunk(hidden), atol=ATOL)
    assert not torch.allclose(model(hidden), shrunk(hidden), atol=1e-2)


def test_tied_parameters_are_cut_once_and_stay_tied():
    torch.manual_seed(0)
    model = Tied()
    change = {"tied": removal(model, TIED, [0, 2, 5])}
    shrunk = shrink(model, [TIED], change)
    assert shrunk.up.weight is shrunk.up2.weight
    assert shrunk.down.weight is shrunk.down2.weight
    assert shrunk.up.weight is not model.up.weight
    assert shrunk.up2.weight.shape == (3, 4)
    assert (shrunk.up2.out_features, shrunk.down2.in_features) == (3, 3)
    hidden = torch.randn(5, 4)
    assert torch.allclose(mask(model, [TIED], change)(hidden), shrunk(hidden), atol=ATOL)
    counted = sum(p.numel() for p in shrunk.parameters())
    assert parameters_after(model, [TIED], {"tied": 3}) == counted == 3 * 4 + 3 + 3 * 4 + 4 + 4 + 1


def test_the_tied_head_of_a_decoder_stays_tied(llama_model):
    sites = llama_sites()
    shrunk = shrink(llama_model, sites, some_removals(llama_model, sites))
    assert shrunk.lm_head.weight is shrunk.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_keep_their_dtype(subject, dtype):
    model, sites = subject
    half = copy.deepcopy(model).to(dtype)
    removals = some_removals(model, sites)
    removals[sites[1].name] = removal(model, sites[1], [])
    for changed in (mask(half, sites, removals), shrink(half, sites, removals)):
        assert {value.dtype for value in changed.parameters()} == {dtype}
    site = sites[2]
    stored = shrink(half, sites, removals).get_parameter(site.writer)
    assert torch.equal(stored.detach(), removals[site.name].weight.to(dtype))


def test_frozen_parameters_stay_frozen_and_gradients_are_dropped(llama_model):
    site = llama_sites()[1]
    model = copy.deepcopy(llama_model).requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones(64, 32)
    shrunk = shrink(model, [site], {site.name: removal(model, site, [4, 8])})
    mlp = shrunk.model.layers[0].mlp
    assert not mlp.down_proj.bias.requires_grad
    assert mlp.up_proj.weight.requires_grad
    assert mlp.up_proj.weight.grad is None


@pytest.mark.parametrize("units", [(1, 17, 3, 40), (4, 64, 4, 64), (0, 5, 2, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("biased", [True, False])
def test_parameters_are_predicted_exactly(subject, units, biased):
    model, sites = subject
    kept = {site.name: min(count, site.units) for site, count in zip(sites, units, strict=True)}
    removals = {
        site.name: removal(model, site, list(range(kept[site.name])), bias=biased)
        for site in sites
        if kept[site.name] < site.units
    }
    counted = sum(value.numel() for value in shrink(model, sites, removals).parameters())
    assert parameters_after(model, sites, kept, biased=biased) == counted


def test_parameters_of_a_head_are_those_counted_by_hand(bert_model):
    total = sum(value.numel() for value in bert_model.parameters())
    head = 3 * (8 * 32 + 8) + 32 * 8
    assert parameters_after(bert_model, bert_sites(), {"0.heads": 3}) == total - head
    assert parameters_after(bert_model, bert_sites(), {"0.heads": 0}) == total - 4 * head
    assert parameters_after(bert_model, bert_sites(), {}) == total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Removal(kept=torch.tensor([2, 1])), "sorted, distinct and int64, not .2, 1."),
        (Removal(kept=torch.tensor([1, 1])), "sorted, distinct"),
        (Removal(kept=torch.tensor([1.0])), "float32"),
        (Removal(kept=torch.tensor([[1]])), "sorted"),
        (Removal(kept=torch.tensor([3, 4])), r"units \[3, 4\] of 4 cannot be kept"),
        (Removal(kept=torch.tensor([-1, 2])), r"units \[-1, 2\] of 4 cannot be kept"),
        (
            Removal(kept=torch.tensor([1]), weight=torch.zeros(32, 9)),
            r"weight of .*dense.weight is \[32, 9\]; 1 units kept need \[32, 8\]",
        ),
        (Removal(kept=torch.tensor([1]), bias=torch.zeros(31)), r"bias .* is \[31\].*\[32\]"),
    ],
)
@pytest.mark.parametrize("build", [mask, shrink])
def test_a_removal_that_does_not_fit_is_refused(bert_model, build, change, message):
    with pytest.raises(CompressError, match=rf"0\.heads: .*{message}"):
        build(bert_model, bert_sites(), {"0.heads": change})


def test_an_unknown_site_is_refused_by_name(bert_model):
    change = {"9.heads": Removal(kept=torch.tensor([1]))}
    for ask in (mask, shrink):
        with pytest.raises(CompressError, match=r"9\.heads is not a site; there are 4 others"):
            ask(bert_model, bert_sites(), change)
    with pytest.raises(CompressError, match="not a site"):
        parameters_after(bert_model, bert_sites(), {"9.heads": 1})


@pytest.mark.parametrize("units", [-1, 5])
def test_a_number_of_units_that_is_not_there_is_refused(bert_model, units):
    with pytest.raises(CompressError, match=f"cannot keep {units} units; it has 4"):
        parameters_after(bert_model, bert_sites(), {"0.heads": units})


def edited(site, **changes):
    return site.model_copy(update=changes)


DENSE = "bert.encoder.layer.0.attention.output.dense"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slices": (Slice(tensor="bert.nowhere.weight", dim=0, width=1),)}, "no module 'bert.nowhere'"),
        ({"slices": (Slice(tensor=f"{DENSE}.other", dim=0, width=1),)}, "no tensor '.*other'"),
        ({"slices": (Slice(tensor=f"{DENSE}.weight", dim=2, width=1),)}, "dimension 2"),
        ({"slices": (Slice(tensor=f"{DENSE}.weight", dim=1, width=9),)}, r"\[0, 36\) of dimension 1"),
        ({"slices": (Slice(tensor=f"{DENSE}.bias", dim=0, width=8),)}, "no slice of its writer"),
        (
            {"writer": f"{DENSE}.bias", "slices": (Slice(tensor=f"{DENSE}.bias", dim=0, width=8),)},
            "matrix",
        ),
        ({"bias": f"{DENSE}.other"}, "no tensor"),
        ({"counts": (Count(module=DENSE, attribute="in_features", per_unit=9),)}, "is 32, not 4 x 9"),
        ({"counts": (Count(module=DENSE, attribute="forward", per_unit=8),)}, "forward is a method"),
        ({"counts": (Count(module="bert", attribute="config.no.thing", per_unit=8),)}, "is a NoneType"),
        ({"counts": (Count(module="bert.x", attribute="in_features", per_unit=8),)}, "no module"),
        ({"drop": Drop(module="bert.encoder.x", writer=True)}, "no module"),
        ({"drop": Drop(module="", writer=True)}, "whole model"),
    ],
)
def test_a_site_of_another_model_is_refused(bert_model, changes, message):
    with pytest.raises(CompressError, match=rf"0\.heads.*{message}"):
        check(bert_model, [edited(bert_sites()[0], **changes)])


def test_sites_that_share_a_unit_are_refused(bert_model):
    first = bert_sites()[1]
    with pytest.raises(CompressError, match=r"0\.ffn and twin both own part of .*disjoint"):
        check(bert_model, [first, edited(first, name="twin")])
    assert [site.name for site in check(bert_model, bert_sites())] == [
        "0.heads",
        "0.ffn",
        "1.heads",
        "1.ffn",
    ]


def test_sites_side_by_side_in_one_tensor_are_disjoint():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    halves = [
        Site(
            name=f"half {start}",
            kind="ffn",
            units=2,
            slices=(
                Slice(tensor="0.weight", dim=0, width=1, start=start),
                Slice(tensor="1.weight", dim=1, width=1, start=start),
            ),
            writer="1.weight",
        )
        for start in (0, 2)
    ]
    assert check(model, halves) == halves


def test_a_shrunk_model_is_not_shrunk_again_by_the_same_sites(bert_model):
    sites = bert_sites()
    shrunk = shrink(bert_model, sites, some_removals(bert_model, sites))
    with pytest.raises(CompressError, match="before it was shrunk"):
        shrink(shrunk, sites, some_removals(bert_model, sites))


def test_shrinking_in_place_spares_the_copy(bert_model):
    sites, model = bert_sites(), copy.deepcopy(bert_model)
    removals = some_removals(model, sites)
    shrink_in_place(model, sites, removals)
    assert torch.equal(logits(model), logits(shrink(bert_model, sites, removals)))


def test_an_emptied_model_traces_with_any_batch_and_length(subject):
    model, sites = subject
    removals = {site.name: removal(model, site, []) for site in sites[:2]}
    shrunk = shrink(model, sites, removals)
    batch, length = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    inputs = tokens() | ({"use_cache": False} if "Llama" in type(model).__name__ else {})
    shapes = {name: {0: batch, 1: length} if name != "use_cache" else None for name in inputs}
    program = torch.export.export(shrunk, (), inputs, dynamic_shapes=shapes, strict=False)
    other = {"input_ids": torch.randint(1, 50, (3, 11)), "attention_mask": torch.ones(3, 11).long()}
    traced = program.module()(**(inputs | other)).logits
    assert (traced - logits(shrunk, inputs | other)).abs().max() <= ATOL
