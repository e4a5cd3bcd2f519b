"""What is said without compiling: what files are timed on, and measuring this machine."""

import pytest
import torch
from support import families

from compress import profiles
from compress.errors import CompressError
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.backends.torch_module import TorchCuda
from compress.export.onnx import decoder
from compress.export.onnx.writer import export
from compress.pipeline import inspection, job
from compress.recipe import Shapes
from compress.report.progress import Quiet


def shapes_of(path, **shapes):
    """The inputs that a file is timed on, by shape."""
    with OrtRunner(path, 1) as runner:
        made = inspection._inputs(runner, Shapes(**shapes))
        runner.infer(made)
    return {name: value.shape for name, value in made.items()}


def test_a_decoder_is_timed_on_a_prompt_or_on_a_token_after_it(tmp_path):
    model, _ = families.build("gpt2")
    decoder.export(model, tmp_path / "model.onnx")
    prompt = shapes_of(tmp_path / "model.onnx", batch=2, tokens=6)
    step = shapes_of(tmp_path / "model.onnx", batch=2, tokens=6, phase="decode")
    for found, tokens, past in ((prompt, 6, 0), (step, 1, 6)):
        assert found["input_ids"] == found["position_ids"] == (2, tokens)
        assert found["attention_mask"] == (2, tokens + past)
        assert found["past_key_values.1.value"] == (2, 4, past, 5)


def test_a_file_without_a_cache_has_no_phases(tmp_path):
    model, example = families.build("fused")
    export(model, example, tmp_path / "model.onnx", outputs=("logits",))
    assert shapes_of(tmp_path / "model.onnx", batch=3, tokens=5) == {
        "input_ids": (3, 5),
        "attention_mask": (3, 5),
    }
    with pytest.raises(CompressError, match="has no key-value cache to decode with; leave out --phase"):
        shapes_of(tmp_path / "model.onnx", phase="decode")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_hidden_width_is_listed_as_a_site_or_with_the_reason_why_not(family):
    model, example = families.build(family)
    found = inspection.inspect("m", model, example).model_dump(mode="json")
    listed = [site for site in found["sites"] if site["kind"] == "residual"]
    refused = [skip for skip in found["skipped"] if skip["place"] == "residual"]
    others = [site for site in found["sites"] if site["kind"] != "residual"]
    assert found["parameters_in_sites"] == sum(site["parameters"] for site in others)
    if family == "gpt2":
        (site,) = listed
        assert found["sites"][-1] == site
        assert (site["name"], site["units"], refused) == ("residual", families.HIDDEN, [])
        inner = 3 * families.HIDDEN + families.NEURONS  # biases of what reads lie outside of the stream
        assert site["parameters"] == found["parameters"] - families.LAYERS * inner
        assert 0 < site["multiplications_share"] <= 1
    else:
        assert listed == []
        assert "normalization after the sum (post-norm)" in refused[0]["reason"]


def test_a_device_that_is_not_here_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        CompressError, match=r"--target h100 cannot be measured here: .* no GPU that torch sees"
    ):
        inspection.measure_target(Quiet(), "h100")


@pytest.mark.slow
def test_the_gpu_here_is_measured_unless_the_processor_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    v100 = profiles.load("v100")
    monkeypatch.setattr(inspection, "target_here", lambda: v100)
    backend = TorchCuda(v100, 1, device="cpu", graphs=False)
    for module in (inspection, job):
        monkeypatch.setattr(
            module, "backend_for", lambda profile, threads: backend if profile == v100 else None
        )
    monkeypatch.setattr("compress.export.microbench.site_timing.CYCLE_LIMITS", (3, 3))
    found = inspection.measure_target(Quiet(), None, "support.classifier:Padded", Shapes(tokens=9))
    assert (found["target"], found["runtime"], found["precision"]) == ("v100", "torch-cpu", "fp32")
    assert len(found["rows"]) == 2
    with pytest.raises(CompressError, match="--target cpu cannot be measured here"):
        inspection.measure_target(Quiet(), "cpu")
