import copy
import functools

import pytest
import torch
from support import families
from torch import nn

from compress.errors import CompressError
from compress.ir import Slice
from compress.sites import prune
from compress.sites.discovery import Sites, find_sites
from compress.sites.equivalence import Call, NotEquivalentError, common_module, verify
from compress.sites.prune import Removal

SAME = 1e-4  # float32, outputs near 1, two layers


@functools.cache
def analyzed(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], Sites]:
    model, example = families.build(name)
    found = find_sites(model, example)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # Fresh biases are zero and fresh weights hardly matter.
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, example, found


def answer(model, example):
    with torch.no_grad():
        output = model(**example)
    if isinstance(output, dict):
        output = next(iter(output.values()))
    return output if isinstance(output, torch.Tensor) else output[0]


def by_kind(sites, kind):
    return [site for site in sites.sites if site.kind == kind]


@pytest.mark.parametrize("name", families.NAMES)
def test_each_layer_gives_one_heads_and_one_ffn_site_with_the_expected_units(name):
    model, _, found = analyzed(name)
    want = families.expected(name)
    assert found.fallback is None
    heads, ffn = by_kind(found, "heads"), by_kind(found, "ffn")
    assert len(ffn) == families.LAYERS
    assert len(heads) == (families.LAYERS if want.heads else 0)
    assert len(found.sites) == len(heads) + len(ffn)
    rows = ffn[0].matmuls[0].rows
    for site in ffn:
        assert (site.units, site.activation, site.gated) == (want.ffn, want.activation, want.gated)
        assert site.column.width == 1
        assert (site.queries, site.head_dim, site.causal) == (1, 0, False)
        assert site.batch * site.tokens == rows
        assert all(m.rows == rows for m in site.matmuls)
    for site in heads:
        assert (site.units, site.head_dim, site.queries) == (want.heads, want.head_dim, want.queries)
        assert site.causal is want.causal
        assert site.column.width == want.head_dim * want.queries
        assert site.batch == families.BATCH
        assert site.batch * site.tokens == rows
        assert site.activation == ""
    names = [site.name for site in found.sites]
    assert len(set(names)) == len(names)
    modules = dict(model.named_modules())
    assert all(n.removesuffix(".heads").removesuffix(".ffn") in modules for n in names)


@pytest.mark.parametrize("name", families.NAMES)
def test_slices_name_every_weight_and_bias_of_the_products_and_fill_their_rows(name):
    model, _, found = analyzed(name)
    for site in found.sites:
        *producers, writer = site.matmuls
        assert writer.weight == site.writer
        assert (writer.inner_per_unit, writer.out_per_unit) == (site.column.width, 0)
        assert writer.inner == site.units * site.column.width
        owners = {part.tensor for part in site.slices}
        for product in producers:
            rows = [part for part in site.slices if part.tensor == product.weight]
            owned = sorted(
                row for part in rows for row in range(part.start, part.start + site.units * part.width)
            )
            assert owned == list(range(product.out))
            assert sum(part.width for part in rows) == product.out_per_unit
            stored = model.get_parameter(product.weight)
            assert sorted(stored.shape) == sorted((product.out, product.inner))
            assert stored.shape[rows[0].dim] == product.out
            bias = product.weight.removesuffix("weight") + "bias"
            present = dict(model.named_parameters()).get(bias) is not None
            assert product.bias is present
            assert (bias in owners) is present
            places = [(part.start, part.width) for part in site.slices if part.tensor == bias]
            assert places == ([(part.start, part.width) for part in rows] if present else [])
        own = site.writer.removesuffix("weight") + "bias"
        assert site.bias == (own if own in dict(model.named_parameters()) else None)
        assert writer.bias is (site.bias is not None)


@pytest.mark.parametrize("name", families.NAMES)
def test_no_tensor_range_lies_in_two_sites(name):
    _, _, found = analyzed(name)
    taken = set()
    for site in found.sites:
        own = {
            (part.tensor, part.dim, index)
            for part in site.slices
            for index in range(part.start, part.start + site.units * part.width)
        }
        assert own
        assert not own & taken
        taken |= own


@pytest.mark.parametrize("name", families.NAMES)
def test_the_whole_model_masked_and_shrunk_agree_and_lose_the_predicted_parameters(name):
    model, example, found = analyzed(name)
    generator = torch.Generator().manual_seed(1)
    removals, lost = {}, 0
    for site in found.sites:
        count = max(1, site.units // 3)
        kept = torch.randperm(site.units, generator=generator)[:count].sort().values
        removals[site.name] = Removal(kept)
        lost += (site.units - count) * site.parameters_per_unit
        tables = [p for p in site.slices if p.tensor.endswith("table")]
        lost += sum(81 * (site.units - count) for _ in tables)  # [9, 9] scores for each head
    shrunk = prune.shrink(model, found.sites, removals)
    masked = prune.mask(model, found.sites, removals)
    before = answer(model, example)
    after = answer(shrunk, example)
    assert torch.allclose(after, answer(masked, example), atol=SAME)
    assert not torch.allclose(after, before, atol=SAME)
    total = [sum(p.numel() for p in m.parameters()) for m in (model, shrunk)]
    assert total[0] - total[1] == lost


@pytest.mark.parametrize("name", families.NAMES)
def test_a_site_without_units_leaves_the_bias_of_its_writer(name):
    model, example, found = analyzed(name)
    going = [site for site in found.sites if site.drop is not None]
    assert len([site for site in going if site.kind == "ffn"]) == families.LAYERS
    removals = {site.name: Removal(torch.tensor([], dtype=torch.int64)) for site in going}
    dropped = prune.shrink(model, found.sites, removals)
    masked = prune.mask(model, found.sites, removals)
    assert torch.allclose(answer(dropped, example), answer(masked, example), atol=SAME)
    left = dict(dropped.named_parameters())
    assert not [m.weight for site in going for m in site.matmuls if m.weight in left]


@pytest.mark.parametrize(
    ("name", "site", "drop"),
    [
        ("bert", "bert.encoder.layer.0.attention", ("attention.self", False, 0, 2)),
        ("bert", "bert.encoder.layer.1.ffn", ("intermediate.dense", False, None, 1)),
        ("distilbert", "distilbert.transformer.layer.0.ffn", ("0.ffn", True, None, 1)),
        ("opt", "model.decoder.layers.0.ffn", ("0.fc1", False, None, 1)),
        ("interleaved", "attention.1", ("attention.1", True, 0, 2)),
        ("fused", "blocks.0.mlp", ("0.mlp", True, None, 1)),
    ],
)
def test_sites_are_named_after_the_module_around_them_and_know_what_to_replace(name, site, drop):
    got = next(s for s in analyzed(name)[2].sites if s.name == site).drop
    module = ".".join(got.module.split(".")[-2:])
    assert (module, got.writer, got.output, got.outputs) == drop
    assert got.module.startswith(site.removesuffix(".ffn"))


def test_producers_beside_a_residual_cannot_be_dropped():
    site = next(s for s in analyzed("fused")[2].sites if s.name == "blocks.0.heads")
    assert site.drop is None


def test_counts_are_found_where_the_module_needs_them_and_only_there():
    wanted = {
        "opt": [("self_attn", "num_heads", 1)],
        "gpt2": [("attn", "split_size", 5)],
        "fused": [("0", "h", 1), ("0", "inner", 6)],
        "interleaved": [("0", "num_heads", 1)],
        "llama": [],
    }
    for name, counts in wanted.items():
        site = by_kind(analyzed(name)[2], "heads")[0]
        got = [(c.module.rpartition(".")[2], c.attribute, c.per_unit) for c in site.counts]
        assert got == counts, name


def test_a_count_in_a_shared_configuration_follows_one_layer_only():
    model, _, found = analyzed("phi3")
    site = by_kind(found, "heads")[1]
    assert ("config.num_attention_heads", 2) in [(c.attribute, c.per_unit) for c in site.counts]
    shrunk = prune.shrink(model, found.sites, {site.name: Removal(torch.tensor([1]))})
    layers = shrunk.model.layers
    assert layers[1].self_attn.config.num_attention_heads == 2
    assert layers[0].self_attn.config.num_attention_heads == families.HEADS


def test_transposed_storage_owns_the_other_dimension():
    site = by_kind(analyzed("gpt2")[2], "heads")[0]
    rows = [(s.dim, s.start, s.width) for s in site.slices if s.tensor.endswith("c_attn.weight")]
    assert rows == [(1, 0, 5), (1, 20, 5), (1, 40, 5)]
    assert (site.column.dim, site.column.width) == (0, 5)


def test_interleaved_heads_own_one_run_of_the_fused_matrix():
    site = by_kind(analyzed("interleaved")[2], "heads")[0]
    assert [(s.tensor, s.start, s.width) for s in site.slices[:2]] == [
        ("attention.0.qkv.weight", 0, 18),
        ("attention.0.qkv.bias", 0, 18),
    ]


def test_a_table_with_one_column_for_each_head_is_part_of_the_site():
    site = by_kind(analyzed("biased_scores")[2], "heads")[1]
    assert Slice(tensor="blocks.1.table", dim=2, width=1) in site.slices


def test_heads_tied_to_a_bias_of_another_layer_are_skipped_with_the_reason():
    skipped = analyzed("t5")[2].skipped
    assert [s.place for s in skipped] == [f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)]
    assert all("relative_attention_bias.weight" in s.reason for s in skipped)
    assert all("4 units" in s.reason for s in skipped)


def test_a_classifier_on_one_row_of_each_input_is_skipped():
    skipped = analyzed("bert")[2].skipped
    assert [(s.place, "one row" in s.reason) for s in skipped] == [("classifier", True)]


def test_the_model_is_left_as_it_was():
    model, example = families.build("bert")
    model.train()
    model.bert.pooler.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    find_sites(model, example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert "use_cache" not in example


class Pair(nn.Module):
    """Two linear layers with something between; `keep` also returns the hidden value."""

    def __init__(self, between, *, residual=False, keep=False, twice=False, inner=12):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.one, self.two = nn.Linear(8, inner), nn.Linear(inner, 8)
        self.between, self.residual, self.keep, self.twice = between, residual, keep, twice

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        h = self.one(x)
        y = self.between(h)
        if self.residual:
            y = y + torch.cat([x, x[..., :4]], -1)
        out = x + self.two(y)
        if self.twice:
            out = out + self.two(self.between(self.one(out)))
        return (out, h.mean(-1)) if self.keep else out


def pair(between, **options):
    torch.manual_seed(0)
    return find_sites(Pair(between, **options).eval(), families.tokens())


def test_two_layers_joined_by_a_function_of_each_value_are_an_ffn():
    found = pair(nn.GELU())
    assert [(s.name, s.kind, s.units, s.activation) for s in found.sites] == [("ffn", "ffn", 12, "gelu")]
    assert found.sites[0].drop.module == "one"


@pytest.mark.parametrize(
    ("between", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.SiLU(), "silu"),
        (nn.Tanh(), "tanh"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (lambda x: x.sin(), "other"),
        (nn.ReLU(inplace=True), "relu"),
    ],
)
def test_the_activation_is_named_by_what_it_computes(between, name):
    found = pair(between)
    assert [(s.activation, s.gated) for s in found.sites] == [(name, False)]


@pytest.mark.parametrize(
    "between",
    [
        nn.LayerNorm(12),
        nn.Softmax(-1),
        nn.Identity(),
        lambda x: x.flip(-1).relu() + x.relu(),
        lambda x: x.cumsum(-1).relu(),
    ],
)
def test_layers_joined_by_what_mixes_features_or_by_nothing_are_no_ffn(between):
    assert pair(between).sites == ()


def test_a_residual_between_two_layers_makes_them_no_ffn():
    assert pair(nn.GELU(), residual=True).sites == ()


def test_a_hidden_value_that_is_read_elsewhere_makes_no_site_and_says_so():
    found = pair(nn.GELU(), keep=True)
    assert found.sites == ()
    assert "also read outside" in found.skipped[0].reason


def test_weights_used_twice_make_no_site_and_say_so():
    found = pair(nn.GELU(), twice=True)
    assert found.sites == ()
    assert {s.reason for s in found.skipped} == {"one.weight is used 2 times in one run"}


def test_weights_that_are_one_tensor_make_no_site_and_say_so():
    torch.manual_seed(0)
    model = nn.Sequential(Pair(nn.GELU())).eval()[0]
    model.spare = nn.Linear(8, 12)
    model.spare.weight = model.one.weight
    found = find_sites(model, families.tokens())
    assert found.sites == ()
    assert "one.weight and spare.weight are one tensor" in found.skipped[0].reason


def test_torch_encoder_layers_give_their_ffn_and_say_why_their_heads_stay():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(20, 4, 36, batch_first=True, activation="gelu")
    model = nn.Sequential(layer).eval()
    found = find_sites(model, {"input": torch.randn(2, 7, 20)})
    assert [(s.name, s.kind, s.units, s.activation) for s in found.sites] == [("0", "ffn", 36, "gelu")]
    assert found.sites[0].drop.module == "0.linear1"
    assert found.skipped[0].place == "0.self_attn"
    assert "does not compute" in found.skipped[0].reason


class Untraceable(nn.Module):
    """Llama's names, and a branch on data that no tracer can follow."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 20)
        self.layers = nn.ModuleList([UntraceableLayer() for _ in range(2)])

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class UntraceableLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = GroupedAttention(), GatedNamed()

    def forward(self, x):
        x = x + self.self_attn(x)
        if x.sum() > 1e9:
            return x
        return x + self.mlp(x)


class GroupedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.is_causal = 4, 2, True
        self.q_proj, self.o_proj = nn.Linear(20, 24), nn.Linear(24, 20)
        self.k_proj, self.v_proj = nn.Linear(20, 12), nn.Linear(20, 12)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.num_heads, 6).transpose(1, 2)
        k, v = (f(x).view(b, t, self.num_kv_heads, 6).transpose(1, 2) for f in (self.k_proj, self.v_proj))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class GatedNamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(20, 36), nn.Linear(20, 36)
        self.down_proj = nn.Linear(36, 20)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_a_model_that_cannot_be_traced_is_searched_by_names_and_says_so():
    torch.manual_seed(0)
    model = Untraceable().eval()
    found = find_sites(model, families.tokens())
    assert "torch.export cannot trace Untraceable" in found.fallback
    assert [(s.name, s.kind, s.units) for s in found.sites] == [
        ("layers.0.self_attn", "heads", 2),
        ("layers.0.mlp", "ffn", 36),
        ("layers.1.self_attn", "heads", 2),
        ("layers.1.mlp", "ffn", 36),
    ]
    traced = find_sites(model.layers[0].self_attn, {"x": torch.randn(2, 7, 20)}).sites[0]
    named = found.sites[0]
    assert (named.queries, named.head_dim, named.causal) == (2, 6, True)
    assert named.shape == traced.shape
    assert [c.attribute for c in named.counts] == ["num_heads", "num_kv_heads"]
    assert (found.sites[1].activation, found.sites[1].gated) == ("silu", True)
    assert all(site.drop and site.drop.writer for site in found.sites)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "opt", "llama", "phi3", "t5", "qwen2"])
def test_names_lead_to_the_sites_that_the_trace_finds(name, monkeypatch):
    model, example, found = analyzed(name)

    def fails(model, example):
        raise RuntimeError("no tracing today")

    monkeypatch.setattr("compress.sites.discovery.Program", fails)
    named = find_sites(model, example)
    assert "no tracing today" in named.fallback
    traced = {site.name: site for site in found.sites}
    assert {site.name for site in named.sites} == traced.keys()
    for site in named.sites:
        other = traced[site.name]
        assert set(site.slices) == set(other.slices)
        assert (site.counts, site.drop, site.bias) == (other.counts, other.drop, other.bias)
        assert (site.units, site.activation, site.gated) == (other.units, other.activation, other.gated)


def test_a_model_that_does_not_run_is_refused_with_the_shapes_it_was_given():
    model, _ = families.build("bert")
    with pytest.raises(CompressError, match=r"does not run.*input_ids.*\[2, 41\]"):
        find_sites(model, families.tokens(length=41))


def test_rows_of_other_heads_fail_the_trial_although_every_shape_fits():
    model, example, found = analyzed("interleaved")
    site = by_kind(found, "heads")[0]
    call = Call((), example)
    assert verify(model, call, site).counts == site.counts
    wrong = []
    for part in site.slices:
        fused = "qkv" in part.tensor
        starts = [24 * third for third in range(3)] if fused else [0]
        wrong += [part.model_copy(update={"start": s, "width": 6}) for s in starts]
    with pytest.raises(NotEquivalentError, match="outputs differ"):
        verify(model, call, site.model_copy(update={"slices": tuple(wrong)}))


@pytest.mark.parametrize("change", ["start", "width", "missing"])
def test_a_site_with_a_wrong_slice_fails_its_trial(change):
    model, example, found = analyzed("interleaved")
    site = by_kind(found, "ffn")[0]
    slices = list(site.slices)
    if change == "start":
        slices[0] = slices[0].model_copy(update={"start": 1})
    elif change == "width":
        slices[0] = slices[0].model_copy(update={"width": 2})
    else:
        slices = [part for part in slices if part.tensor != "feed.0.up.bias"]
    wrong = site.model_copy(update={"slices": tuple(slices)})
    call = Call((), example)
    assert verify(model, call, site).counts == ()
    with pytest.raises(NotEquivalentError):
        verify(model, call, wrong)


def test_a_trial_that_proves_nothing_is_a_failed_one():
    model, example, found = analyzed("fused")
    site = by_kind(found, "ffn")[0]
    idle = copy.deepcopy(model)
    idle.forward = lambda input_ids, attention_mask: idle.embed(input_ids)
    with pytest.raises(NotEquivalentError, match="does not change"):
        verify(idle, Call((), example), site)


@pytest.mark.parametrize("seed", range(4))
def test_a_unit_that_is_zero_for_the_one_input_does_not_hide_the_site(seed):
    torch.manual_seed(seed)  # behind a ReLU, the middle unit is zero for about half of all inputs
    found = find_sites(Pair(nn.ReLU()).eval(), {"input_ids": torch.tensor([[7]])})
    assert [site.kind for site in found.sites] == ["ffn"]


def test_the_innermost_common_module_is_found_by_whole_steps():
    assert common_module(["a.b.x.weight", "a.b.y.weight"]) == "a.b"
    assert common_module(["a.b1.weight", "a.b2.weight"]) == "a"
    assert common_module(["a.weight"]) == "a"
    assert common_module(["a.weight", "b.weight"]) == ""
