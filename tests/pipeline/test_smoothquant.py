import copy
import random
from types import SimpleNamespace

import pytest
import torch
from support import families, tiny

from compress import artifacts
from compress.core import fakequant, ranges
from compress.ir import Budget
from compress.methods import quantized_layers
from compress.pipeline import smoothquant
from compress.pipeline.job import prepare
from compress.recipe import Bench, Calibration, Options, Recipe, Search, Shapes
from compress.report.progress import Quiet
from compress.sites import discovery
from compress.sites.equivalence import distance
from compress.tasks.task import Batch

GATED = "norms values neurons"
MOVABLE = {
    "bert": "values", "roberta": "values", "electra": "values", "distilbert": "values",
    "vit": "norms values", "deit": "norms values", "gpt2": "values", "opt": GATED, "llama": GATED,
    "mistral": GATED, "qwen2": GATED, "qwen3": GATED, "phi3": GATED, "t5": "norms neurons",
    "t5_gated": "norms neurons", "fused": "norms values", "biased_scores": "norms values",
    "interleaved": "neurons",
}  # fmt: skip


def spots(model, inputs):
    """All places with channels, whether or not they may be moved, and their kind."""
    sites = discovery.find_sites(model, inputs).sites
    kinds = {site.writer: {"heads": "values", "ffn": "neurons"}[site.kind] for site in sites}
    inside = [(kinds[spot.readers[0]], spot) for spot in smoothquant.writer_input_pairs(sites)]
    return [*inside, *(("norms", spot) for spot in smoothquant.normalization_pairs(model, sites, inputs))]


def factors(spot, strength=2.0, seed=0):
    drawn = torch.rand(spot.channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return strength ** (2 * drawn - 1)


@pytest.mark.parametrize("name", families.NAMES)
def test_channels_move_where_the_answers_stay_and_nowhere_else(name):
    model, inputs = families.build(name)
    with torch.no_grad():
        before = model(**inputs)
        kinds = {}
        for kind, spot in spots(model, inputs):
            holds = smoothquant.is_equivalent(model, spot, factors(spot), inputs)
            kinds.setdefault(kind, []).append(holds)
            assert distance(model(**inputs), before) == 0  # a trial leaves no trace
            changed = copy.deepcopy(model)
            smoothquant.apply(changed, spot, factors(spot, 30.0))
            assert (distance(changed(**inputs), before) < 1e-5) == holds or kind != "norms"
    assert {kind for kind, held in kinds.items() if any(held)} == set(MOVABLE[name].split())
    for kind in MOVABLE[name].split():
        # Of a gated pair one half is moved, the gate is not.
        assert sum(kinds[kind]) == families.LAYERS * (2 if kind == "norms" and name[:2] != "t5" else 1)


def loud(name):
    """A model of a family with one loud channel in every place, that computes the same; and its parts."""
    model, inputs = families.build(name)
    for _, spot in spots(model, inputs):
        if smoothquant.is_equivalent(model, spot, factors(spot), inputs):
            divide = torch.ones(spot.channels, dtype=torch.float64)
            divide[3] = 1 / 50
            smoothquant.apply(model, spot, divide)
    task = SimpleNamespace(model=model)
    return task, discovery.find_sites(model, inputs).sites, [Batch(inputs, None)]


def rounded(task, sites, batches):
    """How far the answers move when every product of the sites is on static bytes."""
    model = copy.deepcopy(task.model)
    names = [matmul.weight for site in sites for matmul in site.matmuls]
    seen = quantized_layers.observe(task, names, batches)
    with torch.no_grad():
        before = model(**batches[0].inputs)
        places = {}
        for name in names:
            weight = model.get_parameter(name)
            span = ranges.span(seen[name].histogram, "max")
            places[name] = quantized_layers.Place(fakequant.nearest(weight.detach(), "int8-static", span))
        quantized_layers.insert(model, places)
        return distance(model(**batches[0].inputs), before)


@pytest.mark.parametrize("name", ["vit", "opt", "llama", "phi3", "fused"])
def test_loud_channels_are_found_and_rounding_loses_less(name):
    task, sites, batches = loud(name)
    before = copy.deepcopy(task.model.state_dict())
    found = smoothquant.find_pairs(task, sites, batches)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())
    assert len(found) == families.LAYERS * {"vit": 3, "fused": 3}.get(name, 4)
    # The planted channel is what is divided by most.
    assert sum(max(range(len(s.divide)), key=s.divide.__getitem__) == 3 for s in found) >= 0.8 * len(found)
    calm = SimpleNamespace(model=copy.deepcopy(task.model))
    for spot in found:
        smoothquant.apply(calm.model, spot, torch.tensor(spot.divide, dtype=torch.float64))
    inputs = batches[0].inputs
    with torch.no_grad():
        assert distance(calm.model(**inputs), task.model(**inputs)) < 2e-5
    assert rounded(calm, sites, batches) < 0.5 * rounded(task, sites, batches)


def test_grouped_queries_read_one_channel_several_times():
    model, inputs = families.build("llama")
    spot = next(s for kind, s in spots(model, inputs) if kind == "values")
    assert (spot.repeats, spot.units, spot.channels) == (2, families.GROUPS, 12)
    each = spot.spread(torch.arange(12.0)).reshape(families.GROUPS, 2, 6)
    assert torch.equal(each[:, 0], each[:, 1])
    assert torch.equal(spot.gathered(each.flatten()), torch.arange(12.0).expand(2, 12))


@pytest.fixture
def request_of(tmp_path):
    model = tiny.decoder(
        tmp_path / "model", num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    (tmp_path / "text.txt").write_text(
        "\n".join(" ".join(random.Random(0).choices(tiny.WORDS, k=9)) for _ in range(99))
    )

    def make(*moves):
        return Recipe(
            model=str(model), data=str(tmp_path / "text.txt"), task="text-generation", target="cpu",
            budget=Budget(size_mb=0.05), out=str(tmp_path / "out"), shapes=Shapes(tokens=16),
            options=Options(moves=moves), calibration=Calibration(samples=32),
            search=Search(samples=16, generations=1), bench=Bench(blocks=30, block_ms=2.0),
        )  # fmt: skip

    return make


def test_a_job_is_smoothed_once_and_its_baseline_stays(request_of, monkeypatch):
    job = prepare(request_of("structure", "int8"), Quiet())
    calm, notes = smoothquant.smooth_model(job)
    assert calm.baseline is job
    assert calm.key != job.key
    assert notes == [
        "SmoothQuant: activation outliers of 2 normalizations and 2 sites were shifted into the weights that "
        "read them; the model computes the same function"
    ]
    inputs = job.calibration[0].inputs
    with torch.no_grad():
        assert 0 < distance(calm.task.model(**inputs).logits, job.task.model(**inputs).logits) < 1e-5
    monkeypatch.setattr(smoothquant, "find_pairs", None)  # what was found is read, not found again
    again, _ = smoothquant.smooth_model(job)
    assert again.key == calm.key
    monkeypatch.undo()
    member = smoothquant.smooth_model(job.on(copy.deepcopy(job.task.model)).on(job.task.model))
    assert member[0].baseline is job


@pytest.mark.parametrize("move", ["lowrank", "int4"])
def test_without_int8_nothing_is_moved(request_of, move):
    job = prepare(request_of("structure", move), Quiet())
    assert smoothquant.smooth_model(job) == (job, [])


def test_less_is_moved_into_weights_that_may_end_on_4_bits(request_of):
    def most(*moves):
        job = prepare(request_of(*moves), Quiet())
        smoothquant.smooth_model(job)
        found = artifacts.stored_at(job.work / "smoothing.json", smoothquant.Smoothing, job.key)
        return sum(max(spot.divide) / min(spot.divide) for spot in found.spots)

    assert most("structure", "int8", "int4") < most("structure", "int8")
