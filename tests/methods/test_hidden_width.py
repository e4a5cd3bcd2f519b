import copy

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from support import families
from support.stream_models import built, logits, projected, wide
from support.toys import lively
from torch import nn

import compress
from compress.core.rotation import narrowing, principal
from compress.errors import CompressError
from compress.export import huggingface
from compress.export.onnx.writer import export
from compress.methods.hidden_width import find_stream, moments, narrow, recorded, rewrite, site_of
from compress.sites.discovery import find_sites
from compress.sites.prune import Removal, parameters_after, shrink
from compress.tasks.task import Batch

PRE_NORM = ("vit", "gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "phi3")
TIED_TO_HEADS = ("gpt2", "opt")  # which class ViT belongs to depends on transformers
POST_NORM = ("bert", "roberta", "electra", "distilbert", "interleaved")
ATOL = 1e-4  # float32, logits of size one
EXACT = 1e-9  # float64


@pytest.mark.parametrize("name", PRE_NORM)
def test_the_stream_of_a_family_is_found(name):
    model, example = built(name)
    stream = find_stream(model, example)
    layers = families.LAYERS
    assert stream.width == (24 if name in PRE_NORM[3:] else families.HIDDEN)
    assert stream.centered == (name in ("vit", "gpt2", "opt"))
    assert len(stream.norms) == 2 * layers + 1
    readers = {"gpt2": 2, "vit": 4, "opt": 4, "phi3": 2}.get(name, 5) * layers + 1
    assert len(stream.readers) == readers
    sources = {"vit": 4, "gpt2": 2, "opt": 2}.get(name, 1)  # embeddings; a patch convolution and its bias
    biased = 2 if stream.centered else 1
    assert len(stream.writers) == 2 * biased * layers + sources


@pytest.mark.parametrize("name", PRE_NORM)
def test_the_full_width_is_the_original_and_a_part_is_the_projected_model(name):
    model, example = built(name, precise=True)
    before = logits(model, example)
    stream = find_stream(model, example)
    second = wide(stream)
    full = narrow(model, stream, second, stream.width)
    assert (logits(full, example) - before).abs().max() < EXACT
    for width in (stream.width - 1, stream.width // 2, 3):
        narrowed = narrow(model, stream, second, width)
        expected = logits(projected(model, stream, second, width), example)
        assert (logits(narrowed, example) - expected).abs().max() < EXACT
        assert (expected - before).abs().max() > 1e-3
        parts = {p.tensor: p.dim for p in site_of(stream).slices}
        assert {narrowed.get_parameter(n).shape[d] for n, d in parts.items()} == {width}
    assert torch.equal(logits(model, example), before)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_full_width_in_float32(name):
    model, example = built(name)
    stream = find_stream(model, example)
    full = narrow(model, stream, wide(stream), stream.width)
    assert type(full) is type(model)
    assert (logits(full, example) - logits(model, example)).abs().max() < ATOL


def test_a_large_epsilon_needs_the_scaled_stream():
    model, example = built("vit", precise=True)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5
    stream = find_stream(model, example)
    second, width = wide(stream), stream.width // 2
    expected = logits(projected(model, stream, second, width), example)
    assert (logits(narrow(model, stream, second, width), example) - expected).abs().max() < EXACT
    made = narrowing(principal(second, centered=True)[0], width, centered=True)
    scale = (width / stream.width) ** 0.5
    unscaled = copy.deepcopy(model)
    rewrite(unscaled, stream, type(made)(made.down / scale, made.up * scale))
    assert (logits(unscaled, example) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", POST_NORM)
def test_post_norm_models_are_refused_with_the_reason(name):
    model, example = families.build(name)
    with pytest.raises(CompressError, match="post-norm"):
        find_stream(model, example)


def test_other_streams_are_refused_with_the_place():
    model, example = families.build("fused")
    with pytest.raises(CompressError, match=r"head\.weight reads the residual stream before any norm"):
        find_stream(model, example)
    model, example = families.build("deit")
    with pytest.raises(CompressError, match="is an output of the model"):
        find_stream(model, example)
    with pytest.raises(CompressError, match="no LayerNorm or RMSNorm"):
        find_stream(nn.Linear(3, 3), {"input": torch.randn(2, 3)})


class Peeking(nn.Module):
    """A pre-norm model that lets `peek` see its stream."""

    def __init__(self, peek):
        super().__init__()
        self.embed, self.block = nn.Linear(5, 12), nn.Linear(12, 12)
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)
        self.peek = peek

    def forward(self, x):
        x = self.embed(x)
        x = self.peek(x + self.block(self.norm(x)))
        return self.head(self.last(x))


@pytest.mark.parametrize(
    "peek",
    [torch.relu, lambda x: x + 1.0, lambda x: x.flip(-1), lambda x: x * x.mean(-1, keepdim=True), torch.abs],
)
def test_whatever_looks_at_single_channels_is_refused(peek):
    with pytest.raises(CompressError, match="cannot be cut"):
        find_stream(Peeking(peek).eval(), {"x": torch.randn(4, 7, 5)})


@pytest.mark.parametrize(
    "peek", [lambda x: x, lambda x: 2 * x, lambda x: x.flip(1), lambda x: x.mean(1), lambda x: x[:, 0]]
)
def test_whatever_treats_all_channels_alike_is_followed(peek):
    model = lively(Peeking(peek)).double()
    example = {"x": torch.randn(4, 7, 5).double()}
    stream = find_stream(model, example)
    full = narrow(model, stream, wide(stream), 12)
    assert (logits(full, example) - logits(model, example)).abs().max() < EXACT


class Counting(Peeking):
    """Answers in proportion to its own width, which a trace has as a number."""

    def forward(self, x):
        return super().forward(x) * self.embed.out_features


def test_a_use_of_the_width_that_a_trace_does_not_show_fails_the_trial():
    with pytest.raises(CompressError, match="does not compute what the model"):
        find_stream(Counting(lambda x: x).eval(), {"x": torch.randn(4, 7, 5)})


def test_tied_embeddings_part_and_others_stay():
    model, example = built("gpt2", precise=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    stream = find_stream(model, example)
    narrowed = narrow(model, stream, wide(stream), 15)
    assert narrowed.lm_head.weight is not narrowed.transformer.wte.weight
    assert not narrowed.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_shift_reaches_readers_without_a_bias():
    model, example = built("gpt2", precise=True)
    stream = find_stream(model, example)
    narrowed = narrow(model, stream, wide(stream), stream.width)
    assert model.lm_head.bias is None
    assert narrowed.lm_head.bias is None
    assert narrowed.transformer.ln_f.bias.tolist() == [1.0] * stream.width
    assert narrowed.transformer.h[0].ln_1.bias.tolist() == [0.0] * stream.width
    with torch.no_grad():
        narrowed.transformer.ln_f.bias.zero_()
    assert (logits(narrowed, example) - logits(model, example)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_moments_weigh_tokens_by_direction_and_leave_padding_out(name):
    model, example = built(name)
    stream = find_stream(model, example)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    seen = []
    norms = [model.get_submodule(norm.module) for norm in stream.norms]
    hooks = [norm.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for norm in norms]
    found = moments(model, stream, [Batch(example, None, real)])
    for hook in hooks:
        hook.remove()
    rows = torch.cat([values.detach()[real] for values in seen]).double().numpy()
    rows -= rows.mean(1, keepdims=True) if name == "gpt2" else 0  # LayerNorm sees no mean
    rows /= np.sqrt((rows**2).mean(1, keepdims=True))
    assert np.allclose(found.numpy(), rows.T @ rows / len(rows), atol=1e-6)
    with pytest.raises(CompressError, match="padding"):
        moments(model, stream, [])


@pytest.mark.parametrize("name", ["vit", "gpt2", "opt", "qwen2"])
def test_a_narrow_model_survives_saving_and_loading(name, tmp_path):
    model, example = built(name)
    stream = find_stream(model, example)
    narrowed = narrow(model, stream, wide(stream), 10)
    sites, units = recorded(narrowed, stream)
    plain = not units
    assert plain or name != "qwen2"
    assert not plain or name not in TIED_TO_HEADS
    huggingface.save(narrowed, sites, units, tmp_path)
    again = compress.load(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again, example), logits(narrowed, example))
    if plain:
        narrowed.save_pretrained(tmp_path / "plain")
        anywhere = type(model).from_pretrained(tmp_path / "plain").eval()
        assert anywhere.config.hidden_size == 10
        assert torch.equal(logits(anywhere, example), logits(narrowed, example))
    trusted = getattr(
        transformers, "AutoModelForImageClassification" if name == "vit" else "AutoModelForCausalLM"
    )
    by_auto = trusted.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.allclose(logits(by_auto, example), logits(narrowed, example), atol=1e-6)


class Own(nn.Module):
    """A user's pre-norm encoder: fused attention whose writer has no bias, the mean of what is normalized."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(families.VOCABULARY, families.HIDDEN)
        self.blocks = nn.ModuleList([families.FusedBlock() for _ in range(families.LAYERS)])
        self.norm = nn.LayerNorm(families.HIDDEN)
        self.head = nn.Linear(families.HIDDEN, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("name", ["gpt2", "own"])
def test_width_heads_and_neurons_go_together(name, tmp_path):
    factory = None if name == "gpt2" else Own
    model, example = built("gpt2") if factory is None else (lively(Own()), families.tokens())
    stream = find_stream(model, example)
    narrowed = narrow(model, stream, wide(stream), 11)
    listed = find_sites(narrowed, example).sites
    assert {site.kind for site in listed} == {"heads", "ffn"}
    removals = {
        site.name: Removal(
            torch.arange(1, site.units), bias=torch.linspace(0, 1, 11) if site.kind == "heads" else None
        )
        for site in listed
    }
    shrunk = shrink(narrowed, listed, removals)
    site, units = recorded(narrowed, stream)
    kept = {one.name: one.units - 1 for one in listed}
    huggingface.save(shrunk, [*listed, *site], kept | units, tmp_path)
    again = compress.load(tmp_path, factory=factory)
    assert torch.equal(logits(again, example), logits(shrunk, example))


def test_parameters_are_predicted_from_the_site():
    model, example = built("vit")
    stream = find_stream(model, example)
    narrowed = narrow(model, stream, wide(stream), 11)
    site = site_of(stream)
    predicted = parameters_after(model, [site], {site.name: 11})
    assert predicted == sum(value.numel() for value in narrowed.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_a_narrow_model_exports(name, tmp_path):
    model, example = built(name)
    stream = find_stream(model, example)
    narrowed = narrow(model, stream, wide(stream), 10)
    export(narrowed, example, tmp_path / "model.onnx", outputs=("logits",))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {key: value.numpy() for key, value in example.items()})
    assert np.allclose(found, logits(narrowed, example).numpy(), atol=1e-4)
