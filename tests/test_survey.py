import families
import pytest

from compress import survey
from compress.errors import CompressError
from compress.export import decoder
from compress.export.onnx import export
from compress.export.runners import OrtRunner
from compress.recipe import Shapes


def shapes_of(path, **shapes):
    """The inputs that a file is timed on, by shape."""
    with OrtRunner(path, 1) as runner:
        made = survey._inputs(runner, Shapes(**shapes))
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
    export(model, example, tmp_path / "model.onnx", output_name="logits")
    assert shapes_of(tmp_path / "model.onnx", batch=3, tokens=5) == {"input_ids": (3, 5)}
    with pytest.raises(CompressError, match="has no key-value cache to decode with; leave out --phase"):
        shapes_of(tmp_path / "model.onnx", phase="decode")
