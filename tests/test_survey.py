"""Measuring this machine: which device is meant, and what is refused."""

import pytest
import torch

from compress import job, profiles, survey
from compress.console import Quiet
from compress.errors import CompressError
from compress.export.place import Place
from compress.recipe import Shapes


def test_a_device_that_is_not_here_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        CompressError, match=r"--target h100 cannot be measured here: .* no GPU that torch sees"
    ):
        survey.measure_target(Quiet(), "h100")


@pytest.mark.slow
def test_the_gpu_here_is_measured_unless_the_processor_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    v100 = profiles.load("v100")
    monkeypatch.setattr(survey.cuda, "target_at_hand", lambda: v100)
    spot = Place(v100, "torch-cpu", "cpu", 1, graphs=False)
    for module in (survey, job):
        monkeypatch.setattr(module, "place_of", lambda profile, threads: spot if profile == v100 else None)
    monkeypatch.setattr("compress.export.blocks.CYCLES", (3, 3))
    found = survey.measure_target(Quiet(), None, "classifier:Padded", Shapes(tokens=9))
    assert (found["target"], found["runtime"], found["precision"]) == ("v100", "torch-cpu", "fp32")
    assert len(found["rows"]) == 2
    with pytest.raises(CompressError, match="--target cpu cannot be measured here"):
        survey.measure_target(Quiet(), "cpu")
