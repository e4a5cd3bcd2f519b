"""What is special about the writer of files; that every family is written rightly is in test_families.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.errors import CompressError
from compress.export.backends import onnxruntime, parity
from compress.export.backends.onnxruntime import OrtRunner, TorchRunner
from compress.export.onnx import writer
from compress.export.onnx.writer import export, free_dimensions


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, mask):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, t, 8))


class Encoder(nn.Module):
    """Token ids with padding, one block, an answer per token."""

    def __init__(self):
        super().__init__()
        self.embed, self.attend, self.norm = nn.Embedding(20, 8), Attend(), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.5), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask, use_cache=True):
        assert use_cache is False or not torch.compiler.is_exporting()
        x = self.embed(input_ids)
        x = x + self.attend(self.norm(x), attention_mask[:, None, None, :].bool())
        return {"hidden": x, "logits": self.head(x + self.mlp(x))}


def example(batch=2, tokens=6):
    ids = torch.arange(batch * tokens).reshape(batch, tokens) % 20
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encoder():
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The encoder, its file and what was said about it.

    The example holds one item of one token; a part of the model was in training.
    """
    path = tmp_path_factory.mktemp("written") / "model.onnx"
    model = encoder()
    model.mlp.train()
    return model, path, export(model, example(1, 1), path, outputs=("logits",))


def test_the_file_says_what_torch_says_at_every_shape_and_with_padding(written):
    model, path, _ = written
    with (
        OrtRunner(path, 1) as file,
        TorchRunner(model, lambda output: {"logits": output["logits"]}) as reference,
    ):
        batches = parity.padded_examples(example, 7)
        assert len({batch["input_ids"].shape for batch in batches}) == 3
        found = parity.parity(reference, file, batches)
        assert (found.inputs, found.agreement) == (7, 1.0)
        # The control: padding that the file takes for real tokens is seen.
        ignored = [{**batches[-1], "attention_mask": np.ones_like(batches[-1]["attention_mask"])}]
        assert not np.allclose(file.infer(ignored[0])["logits"], file.infer(batches[-1])["logits"], atol=1e-3)


@pytest.mark.parametrize("name", ["embed.weight", "attend.qkv.bias", "norm.weight", "mlp.3.weight"])
def test_a_model_that_was_changed_after_the_export_does_not_pass(written, name):
    _, path, _ = written
    model = encoder()
    model.get_parameter(name).data.mul_(1.02).add_(0.01)
    refused = pytest.raises(CompressError, match=r"disagree: .* at \[\d, \d, \d\] of 'logits'")
    reference = TorchRunner(model, lambda output: {"logits": output["logits"]})
    with OrtRunner(path, 1) as file, reference, refused:
        parity.parity(reference, file, parity.padded_examples(example, 7))


def test_the_same_model_gives_the_same_bytes(written, tmp_path):
    _, path, _ = written
    export(encoder(), example(3, 5), tmp_path / "other.onnx", outputs=("logits",))
    assert (tmp_path / "other.onnx").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_another_process_in_another_place_gives_the_same_bytes(written, tmp_path):
    _, path, _ = written
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_writer as t; from pathlib import Path\n"
        "t.export(t.encoder(), t.example(), Path('model.onnx'), outputs=('logits',))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "model.onnx").read_bytes() == path.read_bytes()


def test_no_path_no_source_line_and_no_trace_stays_in_the_file(written):
    _, path, _ = written
    content = path.read_bytes()
    for secret in (
        b".py",
        b"site-packages",
        b"stack_trace",
        b"forward",
        b"Encoder",
        str(Path.cwd()).encode(),
    ):
        assert secret not in content, secret
    model = onnx.load(path)
    assert not model.doc_string
    assert not model.graph.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_names_and_sizes_are_those_that_the_user_knows(written):
    model, path, said = written
    file = onnx.load(path)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*file.graph.input, *file.graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "tokens"],
        "attention_mask": ["batch", "tokens"],
        "logits": ["batch", "tokens", 3],
    }
    stored = {w.name: onnx.numpy_helper.to_array(w) for w in file.graph.initializer}
    for name, value in model.state_dict().items():
        assert np.array_equal(stored[name], value.numpy()), name
    assert {node.domain for node in file.graph.node} == {""}
    assert [opset.version for opset in file.opset_import] == [writer.OPSET] == [said.opset]
    assert file.producer_name == "compress"
    assert (said.exporter, said.fixed, said.files, said.note) == ("torch.export", (), ("model.onnx",), None)
    assert said.operators == len(file.graph.node)


def test_linear_layers_are_products_with_their_bias_on_rows(written):
    _, path, _ = written
    file = onnx.load(path)
    gemms = [node for node in file.graph.node if node.op_type == "Gemm"]
    assert [list(node.input[1:]) for node in gemms] == [
        [f"{name}.weight", f"{name}.bias"] for name in ("attend.qkv", "attend.out", "mlp.0", "mlp.3", "head")
    ]
    makers = {output: node.op_type for node in file.graph.node for output in node.output}
    assert makers[gemms[3].input[0]] == "Gelu"


def test_modes_and_weights_are_as_before(written):
    model, _, _ = written
    assert {name for name, module in model.named_modules() if module.training} == {
        "mlp", "mlp.0", "mlp.1", "mlp.2", "mlp.3",
    }  # fmt: skip
    for name, value in encoder().state_dict().items():
        assert torch.equal(model.get_parameter(name), value)
        assert model.get_parameter(name).requires_grad


class Variants(nn.Module):
    """Every form of attention that torch's function has, side by side."""

    def forward(self, q, k, v, mask):
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scaled = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        added = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask > 0)
        grouped = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        return torch.cat([causal, scaled, added, masked, grouped], -1)


def test_attention_has_all_the_forms_that_torchs_has(tmp_path):
    def inputs(batch, tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(batch, 4, tokens, 6, generator=generator) for _ in range(3))
        mask = torch.randn(batch, 1, tokens, tokens, generator=generator)
        mask[:, :, range(tokens), range(tokens)] = 1.0  # no row is masked throughout
        return {"q": q, "k": k, "v": v, "mask": mask}

    free = {name: {0: "batch", 2: "tokens"} for name in "qkv"} | {
        "mask": {0: "batch", 2: "tokens", 3: "tokens"}
    }
    said = export(Variants(), inputs(2, 5, 0), tmp_path / "m.onnx", outputs=("y",), dynamic=free)
    assert (said.exporter, said.fixed) == ("torch.export", ())
    with OrtRunner(tmp_path / "m.onnx", 1) as file:
        for batch, tokens in ((2, 5), (3, 8), (1, 1)):
            made = inputs(batch, tokens, 1)
            found = file.infer({name: value.numpy() for name, value in made.items()})["y"]
            assert np.abs(found - Variants()(**made).numpy()).max() < 1e-5
        blind = inputs(2, 5, 2)
        blind["mask"][1, 0, 3] = -1.0  # one row of the fourth form sees nothing
        found = file.infer({name: value.numpy() for name, value in blind.items()})["y"]
        assert np.isfinite(found).all()


class Tied(nn.Module):
    """A table whose size must fit the batch, or the tokens."""

    def __init__(self, *shape):
        super().__init__()
        self.table, self.embed = nn.Parameter(torch.randn(shape)), nn.Embedding(20, 4)

    def forward(self, input_ids):
        return self.embed(input_ids) + self.table


def test_a_size_that_the_model_fixes_is_told(tmp_path):
    model = Tied(6, 4)
    ids = {"input_ids": torch.ones(2, 6, dtype=torch.long)}
    said = export(model, ids, tmp_path / "m.onnx", outputs=("y",))
    assert said.fixed == ("input_ids: tokens = 6",)
    with OrtRunner(tmp_path / "m.onnx", 1) as file:
        assert file.inputs() == {"input_ids": (np.dtype(np.int64), ("batch", 6))}
        other = torch.zeros(3, 6, dtype=torch.long)
        found = file.infer({"input_ids": other.numpy()})["y"]
        assert np.allclose(found, model(other).detach().numpy())


def test_a_model_for_one_batch_size_is_refused(tmp_path):
    with pytest.raises(CompressError, match=r"one batch size only \(input_ids: batch = 2\)"):
        export(
            Tied(2, 1, 4),
            {"input_ids": torch.ones(2, 6, dtype=torch.long)},
            tmp_path / "m.onnx",
            outputs=("y",),
        )
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_beside_the_file_and_are_part_of_its_hash(tmp_path, monkeypatch):
    path, model = tmp_path / "model.onnx", nn.Linear(64, 64)
    inputs = {"input": torch.randn(2, 64)}
    export(model, inputs, path, outputs=("y",))
    whole = path.read_bytes()
    monkeypatch.setattr(writer, "ONE_FILE_BYTES", 0)
    said = export(model, inputs, path, outputs=("y",))
    assert said.files == ("model.onnx", "model.onnx.data")
    assert sorted(part.name for part in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert len(path.read_bytes()) < 2000 < (tmp_path / "model.onnx.data").stat().st_size
    with OrtRunner(path, 1) as file:
        found = file.infer({"input": inputs["input"].numpy()})["y"]
        assert np.allclose(found, model(inputs["input"]).detach().numpy(), atol=1e-5)
    first, beside = onnxruntime.sha256(path), tmp_path / "model.onnx.data"
    beside.write_bytes(beside.read_bytes()[::-1])
    assert onnxruntime.sha256(path) != first
    monkeypatch.undo()
    assert export(model, inputs, path, outputs=("y",)).files == ("model.onnx",)
    assert [part.name for part in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == whole


class Branching(nn.Module):
    """A forward that asks for a value, which `torch.export` refuses."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_the_older_exporter_steps_in_and_the_note_says_why(tmp_path):
    said = export(Branching(), {"x": torch.ones(1, 4)}, tmp_path / "m.onnx", outputs=("y",))
    assert said.exporter == "torchscript"
    assert "cannot be traced for export" in said.note
    assert "must not branch on values" in said.note
    with OrtRunner(tmp_path / "m.onnx", 1) as file:
        assert file.inputs() == {"x": (np.dtype(np.float32), ("batch", 4))}
        found = file.infer({"x": np.full((3, 4), 1.5, np.float32)})
        assert np.array_equal(found["y"], np.full((3, 4), 3.0))
    assert b".py" not in (tmp_path / "m.onnx").read_bytes()


class Factor(nn.Module):
    def forward(self, x):
        return torch.linalg.cholesky(x.transpose(-1, -2) @ x + torch.eye(4))


def test_an_operator_without_translation_is_named_with_its_module(tmp_path, capfd):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Factor()))
    with pytest.raises(CompressError) as refused:
        export(model, {"input": torch.randn(2, 5, 4)}, tmp_path / "m.onnx", outputs=("y",))
    words = str(refused.value)
    assert "no translation for operator aten.linalg_cholesky_ex.default, which 1.1 calls" in words
    assert "torch's older exporter fails as well: UnsupportedOperatorError" in words
    assert "Traceback" not in words
    assert ".py" not in words
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""  # standard output is for one document


def test_an_answer_without_the_wanted_tensor_is_refused(tmp_path):
    class Words(nn.Module):
        def forward(self, x):
            return {"other": x}

    with pytest.raises(CompressError, match="returns dict without 'logits'; say which tensors to keep"):
        export(Words(), {"x": torch.ones(2, 4)}, tmp_path / "m.onnx", outputs=("logits",))


def test_the_wanted_tensor_is_found_in_whatever_a_model_returns():
    class Output:
        logits = torch.ones(1)

    pick, one = writer._named(["logits"]), torch.ones(1)
    for output in (one, {"logits": one, "loss": None}, (one, None), [one], Output()):
        assert torch.equal(pick(output)["logits"], one)
    for output in ({}, (None, one), None, 3.0):
        with pytest.raises(CompressError, match="without 'logits'"):
            pick(output)


def test_several_outputs_are_found_by_name_or_position_and_written_in_order(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return {"unused": x, "low": self.linear(x).unbind(-1)[0], "high": self.linear(x)}

    low, high = torch.ones(2), torch.zeros(2, 3)
    pick = writer._named(["low", "high"])
    for output in ((low, high), {"high": high, "low": low}):
        found = pick(output)
        assert list(found) == ["low", "high"]
        assert torch.equal(found["high"], high)
    with pytest.raises(CompressError, match="returns tuple without 'high'"):
        pick((low,))
    model, x = Pair(), torch.randn(3, 4)
    export(model, {"x": x}, tmp_path / "m.onnx", outputs=("low", "high"))
    with OrtRunner(tmp_path / "m.onnx", 1) as file:
        assert list(file.outputs()) == ["low", "high"]
        answers = file.infer({"x": x.numpy()})
        assert np.allclose(answers["high"][:, 0], answers["low"])
        with TorchRunner(model, writer._named(("low", "high"))) as reference:
            assert parity.parity(reference, file, [{"x": x.numpy()}]).inputs == 3


def test_a_file_that_is_not_valid_never_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the one before")

    def refuse(name):
        assert Path(name) != path
        raise onnx.checker.ValidationError("bad graph\nmore")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(CompressError, match=r"not valid ONNX: ValidationError: bad graph$"):
        export(nn.Linear(4, 4), {"input": torch.ones(2, 4)}, path, outputs=("y",))
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_free_sizes_are_the_batch_and_the_tokens_of_integers():
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)
    made = free_dimensions({"i": ids, "m": mask, "f": torch.ones(2, 5), "p": torch.ones(2, 3, 4, 4)})
    both = {0: "batch", 1: "tokens"}
    assert made == {"i": both, "m": both, "f": {0: "batch"}, "p": {0: "batch"}}
    assert free_dimensions({"n": torch.tensor(1), "v": ids[0]}) == {"n": {}, "v": {0: "batch"}}
