import json
from pathlib import Path

import pytest
import tiny

import compress
from compress import gradual, pipeline
from compress.console import Quiet
from compress.errors import CompressError
from compress.ir import Budget
from compress.recipe import Calibration, Options, Recipe, Recovery, Search

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
    return gradual.run(recipe, Quiet())


def test_a_family_keeps_its_width(recipe):
    wider = recipe.model_copy(update={"options": Options(moves=("structure", "width"))})
    with pytest.raises(
        CompressError, match=r"(?s)--speedup 1\.3x,1\.1x with --moves width: .* run the command once"
    ):
        gradual.run(wider, Quiet())
    assert not Path(recipe.out).exists()


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
        assert any("Recovery (fast" in note for note in report["warnings"])
        assert (folder / "model.onnx").is_file()
        model = compress.load(folder)
        assert sum(value.numel() for value in model.parameters()) == one.parameters


@pytest.mark.slow
def test_a_second_run_makes_the_same_family_and_recovers_nothing_again(recipe, made):
    folders = [Path(recipe.out) / one.directory for one in made.members]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    checkpoints = [(folder / "compression" / "recovery.safetensors").stat().st_mtime_ns for folder in folders]
    again = gradual.run(recipe, Quiet())
    assert [one.score for one in again.members] == [one.score for one in made.members]
    assert weights == [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert checkpoints == [
        (folder / "compression" / "recovery.safetensors").stat().st_mtime_ns for folder in folders
    ]


@pytest.mark.slow
def test_a_member_starts_from_the_recovered_weights_of_the_one_before(recipe, made, tmp_path):
    alone = recipe.model_copy(
        update={"budget": Budget(speedup=SPEEDUPS[1]), "speedups": (), "out": str(tmp_path / "alone")}
    )
    pipeline.run(alone, Quiet())
    family = (Path(recipe.out) / "1.3x" / "model.safetensors").read_bytes()
    assert family != (tmp_path / "alone" / "model.safetensors").read_bytes()
