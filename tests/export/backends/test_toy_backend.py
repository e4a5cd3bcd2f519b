"""The seam of backends, by the ticket it is for: a runtime is one module and one line in BACKENDS."""

import pytest
from support.toy_backend import TARGET, EagerCpu, EagerRunner

from compress import profiles
from compress.errors import CompressError
from compress.export.backends import select
from compress.export.backends.select import backend_for
from compress.measure import timing
from compress.pipeline import compilation
from compress.recipe import Recipe
from compress.report import schema
from compress.report.progress import Quiet


@pytest.fixture
def eager(monkeypatch, tmp_path):
    """The toy backend, registered; counts of what it opened and timed."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(select.BACKENDS, "torch-eager", EagerCpu)
    opened, compared = [], []
    loaded, compare = EagerRunner.__enter__, timing.compare

    def enter(self):
        opened.append(self.model)
        return loaded(self)

    def record(runners, **more):
        compared.append(list(runners))
        return compare(runners, **more)

    monkeypatch.setattr(EagerRunner, "__enter__", enter)
    monkeypatch.setattr(timing, "compare", record)
    return opened, compared


def recipe(folder, **more):
    return Recipe.model_validate(
        {
            "model": "support.classifier:wider",
            "target": TARGET,
            "budget": {"speedup": 1.2},
            "out": str(folder / "out"),
            "shapes": {"tokens": 9},
            "calibration": {"samples": 48, "batch": 16},
            "search": {"samples": 16, "generations": 1, "offspring": 2},
            "bench": {"blocks": 30, "block_ms": 2.0, "rounds": 2},
        }
        | more
    )


def test_a_target_is_elsewhere_until_its_backend_is_registered(monkeypatch):
    profile = profiles.load(TARGET)
    assert backend_for(profile, 1) is None
    monkeypatch.setitem(select.BACKENDS, "torch-eager", EagerCpu)
    assert backend_for(profile, 1) == EagerCpu(profile, 1)
    assert not isinstance(backend_for(profiles.load("cpu"), 1), EagerCpu)


def test_a_whole_compilation_is_priced_timed_proved_and_reported_by_it(eager, tmp_path, monkeypatch):
    opened, compared = eager
    monkeypatch.setattr("compress.export.microbench.site_timing.CYCLE_LIMITS", (6, 6))
    found = compilation.run(recipe(tmp_path), Quiet())
    assert (found.target.name, found.target.runtime) == (TARGET, "torch-eager")
    assert (found.target.threads, found.target.precision) == (1, "fp32")
    assert {site.source for site in found.sites} == {"measured"}
    assert any(site.option.units < site.option.units_total for site in found.sites)
    assert found.rounds
    assert all(turn.measured_speedup is not None for turn in found.rounds)
    assert found.verdict.status in ("met", "missed")  # how fast this machine is does not matter here
    assert found.verdict.measured.interval95[0] <= found.verdict.measured.speedup
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert found.parity.max_abs_difference <= found.parity.tolerance
    assert any("What was timed is the torch module, not the ONNX file" in line for line in found.warnings)
    assert schema.read(tmp_path / "out") == found
    assert ["dense", "compressed"] in compared
    assert len(opened) >= 2 * len([names for names in compared if names == ["dense", "compressed"]])
    tables = list((tmp_path / "cache").rglob("*torch-eager*.json"))
    assert len(tables) == 1


def test_moves_that_it_does_not_execute_are_refused_in_its_words(eager, tmp_path):
    asked = recipe(tmp_path, options={"moves": ["int8"]})
    with pytest.raises(CompressError, match="eager torch multiplies dense float32 only"):
        compilation.run(asked, Quiet())
