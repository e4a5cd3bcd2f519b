import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny

from compress.errors import CompressError
from compress.tasks import pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.classifier(tmp_path_factory.mktemp("models") / "classifier")


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(directory, task=None):
    config = pretrained.read_config(directory)
    return pretrained.load_weights(directory, config, task or pretrained.task_of(config))


def test_a_classifier_is_loaded_in_float32_ready_to_judge(directory):
    weights = load_file(directory / "model.safetensors")
    half = {name: tensor.half() for name, tensor in weights.items()}
    save_file(half, directory / "model.safetensors", {"format": "pt"})
    edit(directory, dtype="float16", torch_dtype="float16")
    model = load(directory)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.state_dict()["classifier.weight"], half["classifier.weight"].float())


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("DeiTForImageClassificationWithTeacher", "image-classification"),
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertModel", "feature-extraction"),
        ("BertForMaskedLM", "feature-extraction"),
    ],
)
def test_the_task_is_found_in_the_architecture(architecture, task):
    config = transformers.BertConfig()
    config.architectures = [architecture]
    assert pretrained.task_of(config) == task


def test_without_an_architecture_a_model_gives_features():
    assert pretrained.task_of(transformers.BertConfig()) == "feature-extraction"


def test_a_classifier_gives_features_without_its_untrained_parts(directory):
    model = load(directory, "feature-extraction")
    assert type(model).__name__ == "BertModel"
    whole = load(directory).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[f"bert.{name}"])


def test_an_encoder_saved_without_a_pooler_is_loaded_without_one(tmp_path):
    config = transformers.BertConfig(**tiny.SIZES)
    tiny.save(transformers.BertForMaskedLM(config), tmp_path / "m", tokenizer=False)
    model = load(tmp_path / "m")
    assert type(model).__name__ == "BertModel"
    assert model.pooler is None


def test_an_encoder_decoder_gives_the_features_of_its_encoder(tmp_path):
    config = transformers.T5Config(
        vocab_size=21, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    tiny.save(transformers.T5Model(config), tmp_path / "m", tokenizer=False)
    assert type(load(tmp_path / "m")).__name__ == "T5EncoderModel"


def test_shards_are_loaded_and_a_missing_one_is_named(directory):
    model = load(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="5KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(map(torch.equal, load(directory).parameters(), model.parameters()))
    shards[-1].unlink()
    with pytest.raises(CompressError, match=f"has no {shards[-1].name}"):
        load(directory)
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CompressError, match=r"index.json is not an index of shards"):
        load(directory)


def test_an_encoder_without_a_head_is_no_classifier(tmp_path):
    directory = tiny.encoder(tmp_path / "m")
    with pytest.raises(CompressError, match=r"no weights for classifier.bias, classifier.weight, which"):
        load(directory, "text-classification")


def test_a_truncated_file_is_named_with_its_size(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CompressError, match=rf"\({path.stat().st_size:,} bytes\) is truncated"):
        load(directory)
    path.write_bytes(b"")
    with pytest.raises(CompressError, match=r"\(0 bytes\) is truncated"):
        load(directory)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(directory, bad):
    weights = load_file(directory / "model.safetensors")
    weights["bert.encoder.layer.0.attention.self.query.weight"][1, :2] = bad
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    message = r"model: bert.encoder.layer.0.attention.self.query.weight holds 2 NaN or infinite.* 256"
    with pytest.raises(CompressError, match=message):
        load(directory)


def test_weights_of_another_shape_are_refused(directory):
    edit(directory, intermediate_size=32)
    with pytest.raises(CompressError, match=r"cannot be loaded for text-classification"):
        load(directory)


def test_a_pickle_is_never_read(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(CompressError, match=r"has no model.safetensors \(none\)"):
        load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CompressError, match=r"only pytorch_model.bin, a pickle, which is never read"):
        load(directory)


def test_remote_code_is_refused(directory):
    edit(directory, model_type="unheard", auto_map={"AutoConfig": "code.Config"})
    (directory / "code.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(CompressError, match=r"asks to run code that came with the model"):
        load(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no readable config.json"),
        ("{", r"config.json is not JSON"),
        ("[]", r"model_type None"),
        ('{"model_type": "berd"}', r"model_type 'berd', which transformers .* does not know"),
        ('{"model_type": "bert", "hidden_size": "wide"}', r"config.json is refused|cannot be loaded"),
    ],
)
def test_a_faulty_config_is_explained(directory, text, message):
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text)
    with pytest.raises(CompressError, match=message):
        load(directory)


def test_names_that_lead_to_no_model_are_explained(directory, monkeypatch):
    assert pretrained.resolve(str(directory)) == directory
    monkeypatch.setattr(pretrained, "snapshot_download", offline)
    with pytest.raises(CompressError, match=r"config.json is a file; give the directory"):
        pretrained.resolve(str(directory / "config.json"))
    with pytest.raises(CompressError, match=r"no directory here; give a directory with config.json"):
        pretrained.resolve("./no/such/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(CompressError, match=r"owner/name is no directory here, .*asked: OSError"):
        pretrained.resolve("owner/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CompressError, match=r"not asked, HF_HUB_OFFLINE is set"):
        pretrained.resolve("name")


def offline(model, allow_patterns):
    raise OSError("no network")


def test_a_hub_id_is_fetched_without_pickles_or_code(tmp_path, monkeypatch):
    asked = {}

    def fetch(model, allow_patterns):
        asked[model] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(pretrained, "snapshot_download", fetch)
    assert pretrained.resolve("owner/name") == tmp_path
    assert list(asked) == ["owner/name"]
    assert not any("*.bin" in pattern or "*.py" in pattern for pattern in asked["owner/name"])


def test_a_missing_or_damaged_tokenizer_is_explained(directory):
    assert pretrained.load_tokenizer(directory)("red")["input_ids"] == [2, 4, 3]
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CompressError, match=r"tokenizer in .* cannot be loaded"):
        pretrained.load_tokenizer(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CompressError, match=r"has no tokenizer: none of tokenizer.json, vocab.txt"):
        pretrained.load_tokenizer(directory)


def test_example_inputs_are_valid_and_always_the_same(directory):
    model = load(directory)
    first, again = (pretrained.example_inputs(model, 3, 20) for _ in range(2))
    assert set(first) == {"input_ids", "attention_mask"}
    assert first["input_ids"].shape == first["attention_mask"].shape == (3, 20)
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert first["attention_mask"].eq(1).all()
    assert 0 < first["input_ids"].min() <= first["input_ids"].max() < 21
    assert model(**first).logits.shape == (3, 2)
    assert pretrained.example_inputs(model, 1, 100)["input_ids"].shape == (1, 24)


def test_examples_hold_no_special_token():
    config = transformers.LlamaConfig(
        **{**tiny.SIZES, "vocab_size": 6, "bos_token_id": 1, "eos_token_id": [2, 3]}
    )
    found = pretrained.example_inputs(transformers.LlamaModel(config), 4, 24)["input_ids"]
    assert set(found.flatten().tolist()) == {4, 5}


def test_positions_that_roberta_keeps_for_padding_are_not_used():
    config = transformers.RobertaConfig(**{**tiny.SIZES, "pad_token_id": 1})
    model = transformers.RobertaModel(config).eval()
    assert pretrained.position_limit(model) == 22
    inputs = pretrained.example_inputs(model, 1, 24)
    assert model(**inputs).last_hidden_state.shape == (1, 22, 16)


def test_relative_positions_have_no_limit():
    config = transformers.T5Config(vocab_size=21, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    assert pretrained.position_limit(model) is None
    assert pretrained.example_inputs(model, 1, 40)["input_ids"].shape == (1, 40)


def test_gpt2_positions_are_found_under_their_other_name():
    config = transformers.GPT2Config(vocab_size=9, n_positions=11, n_embd=8, n_layer=1, n_head=2)
    assert pretrained.position_limit(transformers.GPT2Model(config)) == 11


def test_image_examples_follow_the_config():
    config = transformers.ViTConfig(**{**tiny.VISION, "image_size": (8, 12), "num_channels": 1})
    model = transformers.ViTModel(config).eval()
    pixels = pretrained.example_inputs(model, 2, 99)["pixel_values"]
    assert pixels.shape == (2, 1, 8, 12)
    assert model(pixels).last_hidden_state.shape == (2, 7, 16)
    assert pretrained.image_shape(transformers.ResNetConfig()) == (3, 224, 224)


def test_a_model_without_a_config_has_no_example():
    with pytest.raises(CompressError, match=r"cannot be made for Linear.*package.module:factory"):
        pretrained.example_inputs(torch.nn.Linear(2, 2), 1, 1)


def test_quiet_leaves_the_settings_as_they_were():
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    with pretrained.quiet():
        assert transformers.logging.get_verbosity() == transformers.logging.ERROR
        assert not transformers.logging.is_progress_bar_enabled()
    after = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    assert after == before
