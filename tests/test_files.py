from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch

from compress import files
from compress.errors import CompressError
from compress.export.cache import PAST
from compress.export.runners import OrtRunner
from compress.recipe import Shapes


def job(name, decodes, **shapes):
    """As much of a job as files are made from."""
    model, _ = families.build(name)
    task = SimpleNamespace(
        model=model,
        output_name="logits",
        logits=lambda output: output.logits,
        example=lambda batch, tokens: families.tokens(0, batch=batch, length=tokens),
    )
    sizes = Shapes(**shapes)
    prompt = {name: value.numpy() for name, value in task.example(sizes.batch, sizes.tokens).items()}
    return SimpleNamespace(task=task, decodes=decodes, prompt=prompt, recipe=SimpleNamespace(shapes=sizes))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    own = job("gpt2", True, batch=2, tokens=6)
    files.write(own, own.task.model, path)
    return path


def test_a_run_is_the_phase_that_was_asked_for_unless_another_is_named(file):
    prompt, step = job("gpt2", True, batch=2, tokens=6), job("gpt2", True, batch=2, tokens=6, phase="decode")
    with OrtRunner(file, 1) as runner:
        for own, phase in ((prompt, None), (step, "prefill")):
            found = files.inputs(own, runner, phase)
            assert found["input_ids"].shape == (2, 6)
            assert found[f"{PAST}0.key"].shape == (2, 4, 0, 5)
        for own, phase in ((step, None), (prompt, "decode")):
            found = files.inputs(own, runner, phase)
            assert found["input_ids"].shape == (2, 1)
            assert found[f"{PAST}0.key"].shape == (2, 4, 6, 5)
            files.timed(own, runner, phase)()


def test_a_module_on_a_gpu_is_timed_on_its_prompt_and_not_token_by_token():
    seen = []
    module = SimpleNamespace(timed=lambda inputs: seen.append(inputs) or "a call")
    own = job("gpt2", True, batch=2, tokens=6)
    assert files.timed(own, module) == "a call"
    assert seen[0]["input_ids"].shape == (2, 6)
    with pytest.raises(CompressError, match="leave out --phase decode"):
        files.timed(own, module, "decode")
    with pytest.raises(CompressError, match="leave out --phase decode"):
        files.timed(job("gpt2", True, batch=2, tokens=6, phase="decode"), module)
    assert files.timed(job("bert", False, batch=1, tokens=5), module) == "a call"


def test_a_model_that_does_not_decode_is_written_as_it_is(tmp_path):
    own = job("bert", False, batch=1, tokens=5)
    files.write(own, own.task.model, tmp_path / "model.onnx")
    with OrtRunner(tmp_path / "model.onnx", 1) as runner:
        assert set(runner.inputs()) == {"input_ids", "attention_mask"}
        found = files.inputs(own, runner)
        assert found["input_ids"].shape == (1, 5)
        answer = runner.infer(found)["logits"]
    with torch.inference_mode():
        expected = own.task.model(**own.task.example(1, 5)).logits.numpy()
    assert np.abs(answer - expected).max() < 1e-4
