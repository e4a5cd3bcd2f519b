"""Files with a key-value cache: every way to read a sequence must give what torch says at once."""

import functools

import numpy as np
import onnx
import pytest
import torch
import transformers
from support import families

from compress.errors import CompressError
from compress.export import generation
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.onnx import decoder
from compress.export.onnx.kv_cache import MASK, PAST, POSITIONS, positions
from compress.sites.discovery import find_sites
from compress.sites.prune import Removal, shrink

NAMES = ("gpt2", "llama", "opt", "qwen2", "qwen3", "mistral")
QUICK = {"gpt2", "llama"}
ATOL = 1e-4

each_family = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)


@functools.cache
def dense(name):
    """A decoder whose weights all matter, so that every answer depends on every token."""
    model, example = families.build(name)
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, find_sites(model, example).sites


@functools.cache
def uneven(name, gone=()):
    """It with one key-value head fewer in the last layer, fewer neurons, and the heads of `gone` dropped."""
    model, sites = dense(name)
    removals = {}
    heads = [site for site in sites if site.kind == "heads"]
    for site in sites:
        kept = site.units - 1 if site is heads[-1] or site.kind == "ffn" else site.units
        if site.kind == "heads" and heads.index(site) in gone:
            kept = 0
        if kept < site.units:
            removals[site.name] = Removal(torch.arange(site.units - kept, site.units))
    return shrink(model, sites, removals)


FORMS = {
    "dense": lambda name: dense(name)[0],
    "uneven": uneven,
    "first gone": lambda name: uneven(name, (0,)),
}
every_form = pytest.mark.parametrize("form", FORMS)

# An export takes seconds: by default each form once and both families; every pair with the slow tests.
QUICK_FILES = {("gpt2", "dense"), ("llama", "uneven"), ("llama", "first gone")}
each_file = pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form) if (name, form) in QUICK_FILES else pytest.param(name, form, marks=pytest.mark.slow)
        for name in NAMES
        for form in FORMS
    ],
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("decoders")


@functools.cache
def written(place, name, form):
    """The model and its file, exported once."""
    model = FORMS[form](name)
    path = place / f"{name} {form}.onnx"
    return model, path, decoder.export(model, path)


def prompts(*, padded, batch=3, tokens=7, seed=3):
    """Ids and mask; padding stands on the left, as generation wants it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, families.VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :2] = 0
        mask[1, :4] = 0
    return {"input_ids": ids, MASK: mask}


@torch.inference_mode()
def expected(model, inputs):
    """What torch says to all tokens at once, without any cache."""
    counted = torch.from_numpy(positions(inputs[MASK].numpy(), inputs[MASK].shape[1]))
    return model(**inputs, position_ids=counted, use_cache=False).logits.numpy()


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@every_form
@each_family
def test_a_step_in_torch_is_one_more_token_every_time_it_is_taken(name, form, padded):
    model, inputs = FORMS[form](name), prompts(padded=padded)
    step = decoder.stepper(model, inputs)
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], dim=1),
        MASK: torch.cat([inputs[MASK], torch.ones(3, 1, dtype=torch.int64)], dim=1),
    }
    wanted = expected(model, longer)[:, -1:]
    for _ in range(3):  # the cache stays as long as the prompt
        assert np.abs(step().numpy() - wanted).max() < ATOL
    assert np.abs(expected(model, inputs)[:, -1:] - wanted).max() > 100 * ATOL  # a control: positions count


def numpy(inputs):
    return {name: value.numpy() for name, value in inputs.items()}


def apart(found, wanted, mask):
    """The largest difference at real tokens."""
    return np.abs(found - wanted)[mask.astype(bool)].max()


@each_file
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_prompt_and_then_token_by_token_gives_what_torch_says_at_once(place, name, form, padded):
    model, path, said = written(place, name, form)
    assert (said.exporter, said.fixed) == ("torch.export", ())
    inputs = prompts(padded=padded)
    wanted, mask = expected(model, inputs), inputs[MASK].numpy()
    with OrtRunner(path, 1) as runner:
        assert apart(runner.infer(numpy(inputs))["logits"], wanted, mask) < ATOL
        found = generation.Stepwise(runner).infer(numpy(inputs))["logits"]
        assert found.shape == wanted.shape
        assert apart(found, wanted, mask) < ATOL
        # One token is a prompt as well, and one sequence a batch.
        single = {key: value[:1, -1:] for key, value in inputs.items()}
        one = runner.infer(numpy(single))["logits"]
        assert np.abs(one - expected(model, single)).max() < ATOL


@each_file
def test_greedy_generation_is_that_of_transformers(place, name, form):
    model, path, _ = written(place, name, form)
    for padded in (False, True):
        inputs = prompts(padded=padded, seed=4)
        with torch.inference_mode():
            wanted = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)[
                :, inputs["input_ids"].shape[1] :
            ]
        with OrtRunner(path, 1) as runner:
            found = generation.generate(runner, numpy(inputs), 12)
        assert found.tolist() == wanted.tolist()


@each_file
def test_every_layer_has_a_cache_of_its_own_width(place, name, form):
    layers = (1,) if form == "first gone" else (0, 1)
    model, path, _ = written(place, name, form)
    heads = families.expected(name).heads
    width = families.expected(name).head_dim
    kept = {0: heads, 1: heads if form == "dense" else heads - 1}
    with OrtRunner(path, 1) as runner:
        inputs, outputs = runner.inputs(), runner.outputs()
    names = [f"{number}.{part}" for number in layers for part in ("key", "value")]
    assert list(inputs)[:3] == ["input_ids", MASK, POSITIONS]
    assert list(inputs)[3:] == [f"{PAST}{ending}" for ending in names]
    assert list(outputs) == ["logits", *(f"present.{ending}" for ending in names)]
    assert inputs[MASK][1] == ("batch", "past + tokens")
    assert outputs["logits"] == ("batch", "tokens", families.VOCABULARY)
    for ending in names:
        held = kept[int(ending[0])]
        assert outputs[f"present.{ending}"] == ("batch", held, "past + tokens", width)
        # What readers of config.json would guess otherwise is free for them.
        guessed = model.config.hidden_size // model.config.num_attention_heads
        assert inputs[f"{PAST}{ending}"][1] == (
            "batch",
            held if held == heads else "heads.1",
            "past",
            width if width == guessed else f"width.{ending[0]}",
        )


def test_the_empty_past_may_have_the_size_that_config_json_suggests(place):
    model, path, _ = written(place, "llama", "uneven")
    inputs = prompts(padded=False)
    config = model.config
    shape = (3, config.num_key_value_heads, 0, config.hidden_size // config.num_attention_heads)
    with OrtRunner(path, 1) as runner:
        empty = {n: np.zeros(shape, np.float32) for n in runner.inputs() if n.startswith(PAST)}
        found = runner.infer({**numpy(inputs), **empty})["logits"]
    assert np.abs(found - expected(model, inputs)).max() < ATOL


def test_what_stands_in_the_cache_decides_the_answer(place):
    """The control: another past, another mask or other positions give another answer."""
    _, path, _ = written(place, "gpt2", "dense")
    inputs = numpy(prompts(padded=False))
    with OrtRunner(path, 1) as runner:
        answers = runner.infer(inputs)
        past = generation.following(runner, answers)
        new = {"input_ids": inputs["input_ids"][:, :1], MASK: np.ones((3, 8), np.int64)}
        usual = runner.infer({**new, **past})["logits"]
        hidden = np.array(new[MASK])
        hidden[:, 2] = 0
        for changed in (
            {f"{PAST}0.key": past[f"{PAST}0.key"] + 1},
            {f"{PAST}1.value": past[f"{PAST}1.value"] + 1},
            {POSITIONS: np.full((3, 1), 2)},
            {MASK: hidden, POSITIONS: np.full((3, 1), 7)},
        ):
            other = runner.infer({**new, **past, **changed})["logits"]
            assert np.abs(other - usual).max() > 1e-3, list(changed)


def test_a_window_hides_what_it_hides_in_torch(tmp_path):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=families.VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=36, max_position_embeddings=40, sliding_window=3,
        initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    decoder.export(model, tmp_path / "model.onnx")
    inputs = prompts(padded=True)
    with OrtRunner(tmp_path / "model.onnx", 1) as runner:
        found = generation.Stepwise(runner).infer(numpy(inputs))["logits"]
    wanted = expected(model, inputs)
    assert apart(found, wanted, inputs[MASK].numpy()) < ATOL
    model.config.sliding_window = None  # the control: without the window it is another model
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = None
    assert apart(expected(model, inputs), wanted, inputs[MASK].numpy()) > 1e-3


def test_a_model_without_any_attention_left_needs_no_cache(tmp_path):
    model = uneven("llama", (0, 1))
    assert decoder.widths(model) == {}
    decoder.export(model, tmp_path / "model.onnx")
    inputs = prompts(padded=False)
    with OrtRunner(tmp_path / "model.onnx", 1) as runner:
        assert list(runner.outputs()) == ["logits"]
        found = generation.Stepwise(runner).infer(numpy(inputs))["logits"]
        assert np.abs(found - expected(model, inputs)).max() < ATOL
    with torch.inference_mode():
        wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with OrtRunner(tmp_path / "model.onnx", 1) as runner:
        made = generation.generate(runner, numpy(inputs), 4)
    assert made.tolist() == wanted[:, 7:].tolist()


def test_the_same_model_gives_the_same_bytes(place, tmp_path):
    model, path, _ = written(place, "llama", "uneven")
    decoder.export(model, tmp_path / "other.onnx")
    assert (tmp_path / "other.onnx").read_bytes() == path.read_bytes()
    names = {weight.name for weight in onnx.load(path).graph.initializer}
    assert "model.layers.1.self_attn.k_proj.weight" in names


def test_a_model_without_a_cache_is_refused(tmp_path):
    model, _ = families.build("fused")
    with pytest.raises(CompressError, match=r"Fused takes no key-value cache .*export it as a plain model"):
        decoder.export(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
