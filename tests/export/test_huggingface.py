import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import surgery_models as models
from support.surgery_models import FUSED, TIED, Fused, Tied, logits, removal, some_removals
from torch import nn

from compress import load
from compress.errors import CompressError
from compress.export import huggingface
from compress.export.huggingface import save
from compress.ir import Count
from compress.sites.prune import shrink


def compressed(name, empty=(), bias=True):
    """A shrunk model with the sites and units it was made from."""
    build, make_sites = models.MODELS[name]
    model, sites = build(), make_sites()
    removals = some_removals(model, sites, bias=bias)
    for place in empty:
        removals[sites[place].name] = removal(model, sites[place], [], bias=bias)
    units = {site: len(change.kept) for site, change in removals.items()}
    return shrink(model, sites, removals), sites, units


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory that nobody may change."""
    directory = tmp_path_factory.mktemp("written")
    shrunk, sites, units = compressed("llama", empty=[0])
    save(shrunk, sites, units, directory, {"asked": "2x"})
    return directory


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def edit(directory, change):
    path = directory / "config.json"
    words = json.loads(path.read_text())
    change(words)
    path.write_text(json.dumps(words))


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("empty", [(), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_loaded_model_gives_the_same_logits_bit_for_bit(tmp_path, name, empty, bias):
    shrunk, sites, units = compressed(name, empty, bias)
    save(shrunk, sites, units, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(shrunk))
    assert not loaded.training
    assert list(loaded.state_dict()) == list(shrunk.state_dict())


def test_the_configuration_keeps_what_it_said_of_the_original_model(written):
    words = json.loads((written / "config.json").read_text())
    assert words["model_type"] == "llama"
    assert words["architectures"] == ["LlamaForCausalLM"]
    assert words["num_key_value_heads"] == 2
    assert words["intermediate_size"] == 64
    assert words["dtype"] == "float32"
    assert "_name_or_path" not in words
    ours = words["compression"]
    assert ours["schema_version"] == 1
    assert ours["asked"] == "2x"
    assert [kept["units"] for kept in ours["sites"]] == [0, 31, 1, 31]
    assert [kept["gained_bias"] for kept in ours["sites"]] == [True] * 4


def test_a_directory_holds_four_files_and_no_leftovers(written):
    names = sorted(path.name for path in written.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "modeling_compressed.py"]
    assert {path.stat().st_mode & 0o777 for path in written.iterdir()} == {0o644}


def test_the_defaults_of_generate_come_back(tmp_path):
    shrunk, sites, units = compressed("llama")
    shrunk.generation_config.max_length = 17
    save(shrunk, sites, units, tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert not [key for key in written if key.startswith("_")]
    (tmp_path / "generation_config.json").write_text(json.dumps({**written, "_from_model_config": True}))
    again = load(tmp_path)
    assert again.generation_config.max_length == 17
    assert not again.generation_config._from_model_config


def test_a_shared_tensor_is_stored_once_and_shared_again(written):
    with safe_open(written / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    loaded = load(written)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_was(tmp_path, dtype):
    shrunk, sites, units = compressed("bert")
    shrunk.to(dtype)
    save(shrunk, sites, units, tmp_path)
    loaded = load(tmp_path)
    assert {value.dtype for value in loaded.parameters()} == {dtype}
    assert torch.equal(logits(loaded), logits(shrunk))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_a_model_of_the_users_own_is_rebuilt_by_its_factory(tmp_path):
    torch.manual_seed(0)
    for name, make, site in (("fused", Fused, FUSED), ("tied", Tied, TIED)):
        model = make().eval()
        shrunk = shrink(model, [site], {site.name: removal(model, site, [1, 2])})
        save(shrunk, [site], {site.name: 2}, tmp_path / name)
        assert list(json.loads((tmp_path / name / "config.json").read_text())) == ["compression"]
        hidden = torch.randn(2, 5, 4 if make is Tied else 6)
        assert torch.equal(load(tmp_path / name, make)(hidden), shrunk(hidden))
        with pytest.raises(CompressError, match=r"model of your own.*factory"):
            load(tmp_path / name)


def test_views_of_one_memory_and_transposed_weights_are_stored_apart(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    shared = torch.arange(18.0)
    model[0].weight.data, model[1].weight.data = shared[:9].view(3, 3), shared[9:].view(3, 3).T
    save(model, [], {}, tmp_path)
    again = load(tmp_path, lambda: nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)))
    assert torch.equal(again[0].weight.detach(), torch.arange(9.0).view(3, 3))
    assert torch.equal(again[1].weight.detach(), torch.arange(9.0, 18.0).view(3, 3).T)
    assert len(load_file(tmp_path / "model.safetensors")) == 2


def test_loading_leaves_the_callers_random_numbers_alone(written):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(written)
    assert torch.equal(torch.rand(3), expected)


def test_a_write_that_fails_leaves_the_file_that_was_there(directory, monkeypatch):
    before = (directory / "model.safetensors").read_bytes()

    def half(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "save_file", half)
    shrunk, sites, units = compressed("llama")
    with pytest.raises(CompressError, match=r"cannot be written \(No space left on device\)"):
        save(shrunk, sites, units, directory)
    assert (directory / "model.safetensors").read_bytes() == before
    assert len(list(directory.iterdir())) == 4


def test_extra_words_cannot_replace_what_load_needs(tmp_path):
    with pytest.raises(CompressError, match=r"extra \['sites'\]"):
        save(nn.Linear(1, 1), [], {}, tmp_path, {"sites": 1})


@pytest.mark.parametrize("units", [-1, 3])
def test_more_units_than_there_are_cannot_be_saved(tmp_path, units):
    shrunk, sites, _ = compressed("llama")
    with pytest.raises(CompressError, match=f"cannot keep {units} units; it has 2"):
        save(shrunk, sites, {"0.heads": units}, tmp_path)


def test_only_tensors_are_saved(tmp_path):
    class Odd(nn.Module):
        def get_extra_state(self):
            return "words"

    with pytest.raises(CompressError, match="_extra_state is a str; only tensors"):
        save(Odd(), [], {}, tmp_path)


def test_an_ordinary_model_is_told_from_ours(directory):
    edit(directory, lambda words: words.pop("compression"))
    with pytest.raises(CompressError, match=r"no key 'compression'.*from_pretrained"):
        load(directory)


@pytest.mark.parametrize("words", ["{", "[1]", '"x"', "[" * 100_000])
def test_a_configuration_that_is_no_object_is_refused(directory, words):
    (directory / "config.json").write_text(words)
    with pytest.raises(CompressError, match=r"config\.json (is not JSON|holds a)"):
        load(directory)


def test_a_directory_without_files_is_refused(tmp_path):
    with pytest.raises(CompressError, match=r"config\.json cannot be read \(No such file"):
        load(tmp_path)


def test_an_unknown_schema_is_refused_with_both_numbers(directory):
    edit(directory, lambda words: words["compression"].update(schema_version=7))
    with pytest.raises(CompressError, match="schema_version 7, this program reads 1"):
        load(directory)


def site_of(words, place=1):
    return words["compression"]["sites"][place]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(compression=3), "'compression' is a int, not an object"),
        (lambda w: w["compression"].pop("sites"), r"compression\.sites: Field required"),
        (lambda w: site_of(w).update(units="many"), r"compression\.sites\.1\.units: .*integer"),
        (lambda w: site_of(w).update(units=-1), r"compression\.sites\.1\.units: "),
        (lambda w: site_of(w).update(other=1), r"compression\.sites\.1\.other: "),
        (lambda w: site_of(w).update(units=65), r"0\.ffn keeps 65 units of 64"),
        (
            lambda w: site_of(w).update(units=30),
            r"\[31, 32\], the model of config\.json needs \[30, 32\]",
        ),
        (lambda w: site_of(w).update(units=0), r"no place for, the first is"),
        (
            lambda w: site_of(w).update(gained_bias=False),
            r"holds 1 tensors .*no place for.*down_proj\.bias",
        ),
        (
            lambda w: site_of(w)["site"].update(units=640),
            "does not fit its own model.*belongs to another",
        ),
        (lambda w: site_of(w)["site"].update(writer="../../x"), r"no slice of its writer \.\./"),
        (lambda w: site_of(w)["site"]["slices"][0].update(tensor="/etc/passwd"), "no tensor"),
        (lambda w: site_of(w, 0)["site"]["drop"].update(module="nowhere"), "no module 'nowhere'"),
        (lambda w: w["compression"]["sites"].append(site_of(w)), "must be disjoint"),
        (lambda w: w.update(model_type="nothing"), "has no 'nothing'"),
        (lambda w: w.update(architectures=["AutoConfig"]), "'AutoConfig' is no model class"),
        (lambda w: w.update(architectures=["os"]), "'os' is no model class"),
        (lambda w: w.update(architectures=[]), "architecture None is no model class"),
        (lambda w: w.update(architectures=["../x"]), "no model class"),
        (lambda w: w.update(hidden_size=-4), "LlamaForCausalLM cannot be built"),
        (lambda w: w.update(intermediate_size=8), "does not fit its own model"),
        (lambda w: w.update(vocab_size=60), r"embed_tokens\.weight is \[50, 32\].*\[60, 32\]"),
    ],
)
def test_a_configuration_that_was_tampered_with_is_refused(directory, change, message):
    edit(directory, change)
    with pytest.raises(CompressError, match=re.compile(message, re.DOTALL)):
        load(directory)


def test_a_count_cannot_set_anything_but_a_count(directory):
    count = Count(module="model.layers.0.mlp", attribute="forward", per_unit=1).model_dump()
    edit(directory, lambda words: site_of(words)["site"].update(counts=[count]))
    with pytest.raises(CompressError, match="forward is a method, not 64 x 1"):
        load(directory)


def test_keys_that_lead_to_code_or_kernels_are_not_followed(directory):
    def change(words):
        words["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
        words["attn_implementation"] = words["_attn_implementation"] = "someone/kernels"

    expected = logits(load(directory))
    edit(directory, change)
    assert torch.equal(logits(load(directory)), expected)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(directory, size):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CompressError, match="missing or damaged, write the model again"):
        load(directory)


def test_a_missing_file_is_refused(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(CompressError, match="missing or damaged"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "not 'model.norm.weight', which the model"),
        (lambda t: t.update({"more": torch.ones(1)}), "1 tensors .*the first is 'more'"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"\[31\].*needs \[32\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32).int()}), "int32"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(directory, change, message):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CompressError, match=message):
        load(directory)


@pytest.mark.parametrize(
    "words", ["{", "[1]", '{"max_new_tokens": -1}', '{"compile_config": 3}', '{"validate": 1}']
)
def test_broken_defaults_of_generate_are_refused(directory, words):
    (directory / "generation_config.json").write_text(words)
    with pytest.raises(CompressError, match="generation_config"):
        load(directory)
