"""That the file beside the weights loads them through AutoModel, without `compress`, to the same model."""

import ast
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from support import families
from support.surgery_models import removal
from torch import nn

from compress import load
from compress.export import huggingface
from compress.sites import modeling
from compress.sites.discovery import find_sites
from compress.sites.modeling import Bias, Drop, Dropped, reduce, set_count
from compress.sites.prune import shrink

AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "distilbert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "roberta": "AutoModel",
    "t5": "AutoModelForTextEncoding",
}


@pytest.fixture(autouse=True)
def _own_modules(tmp_path_factory, monkeypatch):
    """transformers copies the file into a cache of its own before it runs it."""
    place = str(tmp_path_factory.mktemp("modules"))
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and hasattr(module, "HF_MODULES_CACHE"):
            monkeypatch.setattr(module, "HF_MODULES_CACHE", place)
    monkeypatch.syspath_prepend(place)
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@torch.inference_mode()
def run(model, name):
    answer = model(**families.FAMILIES[name][1]())
    return answer["logits"] if "logits" in answer else answer["last_hidden_state"]


def written(name, directory):
    """A family with unequal widths and dropped modules, in a directory; the model that was written."""
    model, example = families.build(name)
    sites = find_sites(model, example).sites
    removals = {}
    for index, site in enumerate(sites):
        empty = site.drop is not None and index in (0, len(sites) - 1)
        removals[site.name] = removal(model, site, range(0 if empty else 1 + index % 2), seed=index)
    assert any(not len(change.kept) for change in removals.values())
    shrunk = shrink(model, sites, removals)
    huggingface.save(shrunk, sites, {site: len(change.kept) for site, change in removals.items()}, directory)
    return shrunk


@pytest.fixture(scope="module", params=AUTO)
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, directory, run(written(request.param, directory), request.param)


def trusted(name, directory):
    model, notes = getattr(transformers, AUTO[name]).from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True
    )
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def test_a_trusting_auto_class_gives_the_same_answers(saved):
    name, directory, expected = saved
    model = trusted(name, directory)
    assert torch.equal(run(model, name), expected)
    assert type(model).__module__.startswith("transformers_modules.")
    assert isinstance(model, getattr(transformers, type(model).__name__))
    assert {value.device.type for value in model.parameters()} == {"cpu"}


def test_what_was_loaded_and_saved_again_loads_in_both_ways(saved, tmp_path):
    name, directory, expected = saved
    model = trusted(name, directory)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.5)
    changed = run(model, name)
    assert not torch.equal(changed, expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(run(trusted(name, tmp_path / "again"), name), changed)
    assert torch.equal(run(load(tmp_path / "again"), name), changed)


def test_without_trust_the_file_is_not_run_and_nothing_is_loaded_by_mistake(saved):
    name, directory, _ = saved
    if name == "t5":
        pytest.skip("no site has another width, both are dropped: transformers warns, and loads what is left")
    with pytest.raises(RuntimeError, match=r"size|shape|mismatch"):
        getattr(transformers, AUTO[name]).from_pretrained(directory, trust_remote_code=False)
    assert not any(key.startswith("transformers_modules.") for key in sys.modules)


def test_a_model_of_the_configuration_alone_has_the_shapes_of_the_weights(saved):
    name, directory, _ = saved
    config = transformers.AutoConfig.from_pretrained(directory)
    config.name_or_path = str(directory)
    model = getattr(transformers, AUTO[name]).from_config(config, trust_remote_code=True)
    shapes = {key: value.shape for key, value in load(directory).state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert run(model, name).isfinite().all()


def test_the_file_names_torch_and_transformers_and_nothing_of_ours(saved):
    tree = ast.parse((saved[1] / huggingface.MODELING).read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots - sys.stdlib_module_names == {"torch", "transformers"}


def test_the_configuration_names_the_file_for_the_class_of_the_model_only(saved):
    name, directory, _ = saved
    words = json.loads((directory / "config.json").read_text())
    kind = words["architectures"][0]
    assert words["auto_map"][AUTO[name]] == f"modeling_compressed.{kind}"
    assert "AutoConfig" not in words["auto_map"]
    if kind.endswith("ForSequenceClassification"):
        assert list(words["auto_map"]) == ["AutoModelForSequenceClassification"]


@pytest.mark.slow
def test_it_loads_where_compress_is_not_installed(tmp_path):
    expected = run(written("llama", tmp_path / "out"), "llama")
    code = f"""
import sys
class No:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "compress":
            raise ImportError(name)
sys.meta_path.insert(0, No())
import json, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
inputs = {{key: torch.tensor(value) for key, value in {
        {k: v.tolist() for k, v in families.tokens().items()}
    }.items()}}
print(json.dumps(model(**inputs).logits.tolist()))
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)


def test_a_decoder_generates_the_same(tmp_path):
    shrunk = written("llama", tmp_path)
    prompt = {**families.tokens(), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = shrunk.generate(**prompt)
    assert torch.equal(trusted("llama", tmp_path).generate(**prompt), expected)
    assert expected.shape[1] > families.TOKENS


@pytest.fixture
def directory(tmp_path):
    written("bert", tmp_path / "out")
    return tmp_path / "out"


def changed(directory, change):
    path = directory / "config.json"
    words = json.loads(path.read_text())
    change(words)
    path.write_text(json.dumps(words))


def test_a_configuration_without_a_record_says_so(directory):
    changed(directory, lambda words: words.pop("compression"))
    with pytest.raises(ValueError, match=r"config\.json has no 'compression' with 'sites'"):
        trusted("bert", directory)


def test_names_of_another_version_are_told_with_what_to_install(directory):
    def change(words):
        part = words["compression"]["sites"][1]["site"]["slices"][0]
        part["tensor"] = "bert.layers.0.query.weight"
        words["transformers_version"] = "4.0.0"

    changed(directory, change)
    words = r"units were removed from 'bert\.layers\.0\.query\.weight'.*under transformers_version"
    with pytest.raises(ValueError, match=words):
        trusted("bert", directory)
    with pytest.raises(ValueError, match=r"no module 'bert\.layers.*written under transformers 4\.0\.0"):
        load(directory)


def test_weights_of_other_widths_are_not_loaded(directory):
    changed(directory, lambda words: words["compression"]["sites"][1].update(units=3))
    with pytest.raises(RuntimeError, match=r"size|shape|mismatch"):
        trusted("bert", directory)


def test_a_directory_without_the_file_still_loads_with_compress(directory):
    expected = run(load(directory), "bert")
    (directory / huggingface.MODELING).unlink()
    assert torch.equal(run(load(directory), "bert"), expected)
    with pytest.raises(OSError, match="modeling_compressed"):
        trusted("bert", directory)


def test_damaged_weights_are_refused(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Exception, match=r"[Hh]eader|safetensors"):
        trusted("bert", directory)


def test_a_model_of_the_users_own_gets_no_file(tmp_path):
    huggingface.save(nn.Linear(2, 2), [], {}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_reducing_works_without_memory_for_the_weights(saved):
    name, directory, _ = saved
    words = json.loads((directory / "config.json").read_text())
    with torch.device("meta"):
        model = families.FAMILIES[name][0]()
    reduce(model, words["compression"]["sites"])
    assert {value.device.type for value in model.parameters()} == {"meta"}
    shapes = {key: value.shape for key, value in load(directory).state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


def test_a_dropped_module_tells_a_cache_by_any_of_its_names():
    hidden = torch.ones(2, 3, 4)
    for name in modeling.CACHES:
        told = []
        cache = SimpleNamespace(update=lambda key, value, layer, told=told: told.append((key.shape, layer)))
        stand_in = Dropped(Drop({"output": None, "outputs": 1}), Bias(4, None), 1)
        stand_in(hidden, **dict.fromkeys(modeling.CACHES) | {name: cache})
        assert told == [((2, 1, 3, 1), 1)]


def test_a_dotted_count_is_set_on_a_copy_of_what_is_shared():
    config = SimpleNamespace(heads=4)
    one, two = SimpleNamespace(config=config, heads=4), SimpleNamespace(config=config)
    set_count(one, "config.heads", 2)
    set_count(one, "heads", 3)
    assert (one.config.heads, one.heads, two.config.heads, config.heads) == (2, 3, 4, 4)


class Attention(nn.Module):
    """Attention as transformers 4 has it: the shapes come from two attributes."""

    def __init__(self, names, heads=4, head_dim=2, hidden=8):
        super().__init__()
        self.names = names
        for name, value in zip(names, (heads, heads * head_dim), strict=True):
            setattr(self, name, value)
        self.query = nn.Linear(hidden, heads * head_dim)

    def stated(self):
        return tuple(getattr(self, name) for name in self.names)

    def forward(self, hidden):
        heads, width = self.stated()
        found = self.query(hidden).view(len(hidden), -1, heads, width // heads)
        return found.reshape(len(hidden), -1, width)


BERT, DISTILBERT = ("num_attention_heads", "all_head_size"), ("n_heads", "dim")


def attention_record(units, **more):
    inner = {"tensor": "self.query.weight", "dim": 0, "width": 2, "start": 0}
    outer = {"tensor": "dense.weight", "dim": 1, "width": 2, "start": 0}
    site = {
        "slices": [inner, inner | {"tensor": "self.query.bias"}, outer],
        "counts": [], "units": 4, "writer": "dense.weight", "head_dim": 2, "queries": 1,
    }  # fmt: skip
    return [{"site": site | more, "units": units, "gained_bias": False}]


def attention_model(monkeypatch, names=BERT, module="transformers.models.bert"):
    monkeypatch.setattr(Attention, "__module__", module)
    model = nn.Module()
    model.add_module("self", Attention(names))
    model.add_module("dense", nn.Linear(8, 8))
    return model, model.get_submodule("self")


@pytest.mark.parametrize("names", [BERT, DISTILBERT])
def test_a_record_without_counts_loads_where_heads_are_counted_by_attributes(monkeypatch, names):
    """transformers 5 needs no count to run with fewer heads, and so its records name none."""
    model, own = attention_model(monkeypatch, names)
    reduce(model, attention_record(3))
    assert own.stated() == (3, 6)
    assert model.get_submodule("dense")(own(torch.ones(2, 5, 8))).shape == (2, 5, 8)


def test_attributes_that_count_something_else_stay(monkeypatch):
    model, own = attention_model(monkeypatch)
    own.num_attention_heads = 5
    reduce(model, attention_record(3))
    assert own.stated() == (5, 8)
    model, own = attention_model(monkeypatch)
    own.all_head_size = 10
    reduce(model, attention_record(3))
    assert own.stated() == (4, 10)
    model, own = attention_model(monkeypatch, DISTILBERT, module="somebody.models")
    reduce(model, attention_record(3))
    assert own.stated() == (4, 8)


def test_a_group_counts_for_all_its_queries(monkeypatch):
    model, own = attention_model(monkeypatch)
    own.num_attention_heads, own.all_head_size = 8, 16
    reduce(model, attention_record(3, queries=2))
    assert own.stated() == (6, 12)
