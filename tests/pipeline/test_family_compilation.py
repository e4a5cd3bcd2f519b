import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny
from support.toys import job_of, logits

import compress
from compress import profiles
from compress.errors import CompressError
from compress.ir import Budget
from compress.pipeline import compilation, family_compilation, pricing
from compress.pipeline import width_search as widths
from compress.recipe import Calibration, Options, Recipe, Recovery, Search
from compress.report.progress import Quiet

SPEEDUPS = (1.1, 1.3)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A tiny classifier for a device that is not here: nothing is timed, so every run is the same."""
    place = tmp_path_factory.mktemp("gradual")
    model = tiny.classifier(place / "model", hidden_size=32, intermediate_size=96, num_hidden_layers=2)
    rows = ["text,label"]
    for k in range(120):
        first, second = tiny.WORDS[k % 12], tiny.WORDS[(5 * k + k // 12) % 12]
        rows.append(f"{first} {second},{'on' if k % 12 < 6 else 'off'}")
    (place / "data.csv").write_text("\n".join(rows) + "\n")
    return Recipe(
        model=str(model),
        data=str(place / "data.csv"),
        target="rpi5",
        budget=Budget(speedup=SPEEDUPS[0]),
        speedups=SPEEDUPS[::-1],
        out=str(place / "family"),
        calibration=Calibration(samples=64),
        search=Search(generations=2, offspring=2),
        recovery=Recovery(mode="fast", epochs=2, rate=1e-3),
    )


@pytest.fixture(scope="module")
def made(recipe):
    return family_compilation.run(recipe, Quiet())


def test_widths_of_a_model_that_has_none_to_cut_are_refused_as_for_a_single_one(recipe, tmp_path):
    changes = {"options": Options(moves=("structure", "width")), "out": str(tmp_path / "out")}
    with pytest.raises(CompressError, match="--moves width does not support this model"):
        family_compilation.run(recipe.model_copy(update=changes), Quiet())


def test_the_baseline_of_a_later_member_is_the_dense_model(tmp_path):
    job = job_of("llama", tmp_path / "out")
    later = job.on(copy.deepcopy(job.task.model))
    assert later.baseline is later.on(job.task.model).baseline.baseline is job
    assert later.task.model is not job.task.model


def sized(folder, widths, spare):
    """A job for a device that is not here; its file is to be smaller than the dense one by some bytes."""
    job = job_of("llama", folder, rank=8, search=Search(samples=8, generations=1))
    dense = pricing.export_dense(job).stat().st_size
    changes = {
        "budget": Budget(size_mb=(dense - spare) / 1e6),
        "target": "rpi5",
        "options": job.recipe.options.model_copy(update={"widths": widths}),
    }
    job.task.samples, job.task.score = {"test": 8}, lambda run, split="test", limit=None: 0.5
    recipe = job.recipe.model_copy(update=changes)
    return replace(job, recipe=recipe, profile=profiles.load("rpi5"))


@pytest.mark.slow
def test_a_later_member_begins_at_the_width_of_the_one_before_and_may_become_narrower(tmp_path):
    first = compilation.compiled(sized(tmp_path / "first", (0.7,), 11_000))
    assert (first.job.narrowed.units, first.job.narrowed.site.units) == (16, 24)
    inputs = first.job.task.example(2, 7)
    assert torch.allclose(
        logits(first.job.task, first.expanded(), inputs),
        logits(first.job.task, first.model, inputs),
        atol=1e-5,
    )
    job = sized(tmp_path / "second", (0.9, 0.7, 0.33), 22_000)
    begun = widths.from_previous(job, first.job, first.expanded())
    assert (begun.baseline, begun.narrowed.units) == (job, 16)
    assert torch.equal(logits(job.task, begun.task.model, inputs), logits(job.task, first.expanded(), inputs))
    second = compilation.compiled(job, first)
    assert [one.units for one in second.report.widths] == [16, 8]
    assert [one.units for one in second.report.widths if one.chosen] == [8]
    less = second.job.narrowed
    assert (less.wide, less.down.shape, less.site.units) == (job, (8, 24), 24)
    stream = less.down.T @ less.down  # directions of the dense stream that are left
    assert torch.linalg.matrix_rank(stream) == 8
    (cut,) = [site for site in second.report.sites if site.kind == "residual"]
    assert (cut.option.units, cut.option.units_total) == (8, 24)
    assert second.report.compressed.parameters < first.report.compressed.parameters
    again = compress.load(tmp_path / "second")
    assert sum(value.numel() for value in again.parameters()) == second.report.compressed.parameters
    third = widths.from_previous(
        sized(tmp_path / "third", (0.7, 0.33), 22_000), second.job, second.expanded()
    )
    assert widths.candidate_widths(third, widths.find_stream(third)) == []


@pytest.mark.slow
def test_every_member_is_a_whole_output_and_later_ones_are_smaller(recipe, made):
    assert [one.directory for one in made.members] == ["1.1x", "1.3x"]
    sizes = [one.parameters for one in made.members]
    assert made.dense_parameters > sizes[0] > sizes[1]
    assert {one.status for one in made.members} == {"not_measured"}
    for one in made.members:
        folder = Path(recipe.out) / one.directory
        report = json.loads((folder / "compression" / "report.json").read_text())
        assert report["verdict"]["asked"]["speedup"] == one.speedup
        assert any("Recovery (fast" in note for note in report["notes"])
        assert (folder / "model.onnx").is_file()
        model = compress.load(folder)
        assert sum(value.numel() for value in model.parameters()) == one.parameters


@pytest.mark.slow
def test_a_second_run_makes_the_same_family_and_recovers_nothing_again(recipe, made):
    folders = [Path(recipe.out) / one.directory for one in made.members]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    checkpoints = [
        (folder / "compression" / "work" / "recovery.safetensors").stat().st_mtime_ns for folder in folders
    ]
    again = family_compilation.run(recipe, Quiet())
    assert [one.score for one in again.members] == [one.score for one in made.members]
    assert weights == [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert checkpoints == [
        (folder / "compression" / "work" / "recovery.safetensors").stat().st_mtime_ns for folder in folders
    ]


@pytest.mark.slow
def test_a_member_starts_from_the_recovered_weights_of_the_one_before(recipe, made, tmp_path):
    alone = recipe.model_copy(
        update={"budget": Budget(speedup=SPEEDUPS[1]), "speedups": (), "out": str(tmp_path / "alone")}
    )
    compilation.run(alone, Quiet())
    family = (Path(recipe.out) / "1.3x" / "model.safetensors").read_bytes()
    assert family != (tmp_path / "alone" / "model.safetensors").read_bytes()
