from types import SimpleNamespace

import pytest
from support import families

from compress.export.backends.onnxruntime import OrtRunner
from compress.export.backends.torch_cuda import CudaRunner
from compress.export.onnx.kv_cache import PAST
from compress.pipeline import model_files
from compress.recipe import Shapes


def job(name, decodes, **shapes):
    """As much of a job as files are made from."""
    model, _ = families.build(name)
    task = SimpleNamespace(
        model=model,
        outputs=("logits",),
        output_tensors=lambda output: {"logits": output.logits},
        example=lambda batch, tokens: families.tokens(0, batch=batch, length=tokens),
    )
    sizes = Shapes(**shapes)
    prompt = {name: value.numpy() for name, value in task.example(sizes.batch, sizes.tokens).items()}
    return SimpleNamespace(task=task, decodes=decodes, prompt=prompt, recipe=SimpleNamespace(shapes=sizes))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    own = job("gpt2", True, batch=2, tokens=6)
    model_files.write(own, own.task.model, path)
    return path


def test_a_run_is_the_phase_that_was_asked_for_unless_another_is_named(file, monkeypatch):
    prompt, step = job("gpt2", True, batch=2, tokens=6), job("gpt2", True, batch=2, tokens=6, phase="decode")
    fed = []
    timed = OrtRunner.timed
    monkeypatch.setattr(OrtRunner, "timed", lambda self, feed: fed.append(feed) or timed(self, feed))
    with OrtRunner(file, 1) as runner:
        for own, phase in ((prompt, None), (step, "prefill")):
            model_files.timed(own, runner, phase)()
            found = fed.pop()
            assert found["input_ids"].shape == (2, 6)
            assert found[f"{PAST}0.key"].shape == (2, 4, 0, 5)
        for own, phase in ((step, None), (prompt, "decode")):
            model_files.timed(own, runner, phase)()
            found = fed.pop()
            assert found["input_ids"].shape == (2, 1)
            assert found[f"{PAST}0.key"].shape == (2, 4, 6, 5)


def test_a_module_on_a_gpu_is_timed_in_the_phase_that_was_asked_for(monkeypatch):
    seen = []
    for name in ("timed", "timed_step"):
        monkeypatch.setattr(
            CudaRunner, name, lambda self, inputs, name=name: seen.append((name, inputs["input_ids"].shape))
        )
    own, step = job("gpt2", True, batch=2, tokens=6), job("gpt2", True, batch=2, tokens=6, phase="decode")
    with CudaRunner(own.task.model, own.task.output_tensors, device="cpu", precision="fp32") as runner:
        for asked, phase in ((own, None), (own, "decode"), (step, None), (step, "prefill")):
            model_files.timed(asked, runner, phase)
    assert [name for name, _ in seen] == ["timed", "timed_step", "timed_step", "timed"]
    assert {shape for _, shape in seen} == {(2, 6)}
