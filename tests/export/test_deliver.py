import pytest
from outputs import write_model, write_output

from compress import cli
from compress.errors import CompressError
from compress.export import deliver, ort, runners


@pytest.fixture
def out(tmp_path):
    write_output(tmp_path / "out")
    return tmp_path / "out"


def test_onnx_is_the_file_that_was_proven(out, tmp_path):
    (written,) = deliver.deliver(out, "onnx", tmp_path / "a" / "b")
    assert written == tmp_path / "a" / "b" / "model.onnx"
    assert runners.sha256(written) == runners.sha256(out / "model.onnx")


def test_ort_loads_in_onnxruntime(out):
    (written,) = deliver.deliver(out, "ort")
    assert written.read_bytes()[4:8] == b"ORTM"
    with runners.OrtRunner(written, threads=1) as runner:
        assert set(runner.inputs()) == {"input_ids", "attention_mask"}


def test_a_file_that_is_no_model_cannot_become_ort(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(CompressError, match=r"m.onnx cannot be written as .ort"):
        ort.convert(tmp_path / "m.onnx", tmp_path / "m.ort")


def test_an_earlier_export_is_replaced_and_anything_else_is_not(out, tmp_path):
    place = tmp_path / "there"
    deliver.deliver(out, "edge", place)
    (place / "measured.json").write_text("old")
    deliver.deliver(out, "onnx", place)
    assert {path.name for path in place.iterdir()} == {"model.onnx", deliver.MARK}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(CompressError, match="mine holds something else"):
        deliver.deliver(out, "onnx", tmp_path / "mine")
    with pytest.raises(CompressError, match=r"thesis.tex is a file; .*--archive"):
        deliver.deliver(out, "onnx", tmp_path / "mine" / "thesis.tex")
    with pytest.raises(CompressError, match=r"name a file that ends in .tar.gz"):
        deliver.deliver(out, "onnx", tmp_path / "mine" / "thesis.tex", archive=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["model.onnx", "compression/dense.onnx"])
def test_a_file_that_changed_after_the_report_is_refused(out, capfd, name):
    write_model(out / name, 8, 1)
    assert cli.perform(["export", str(out), "--to", "edge"]) == 2
    assert "is not the file that the report is about" in capfd.readouterr().err
    (out / name).unlink()
    assert cli.perform(["export", str(out), "--to", "edge"]) == 2
    assert "does not exist; run compress with --out" in capfd.readouterr().err


def test_bad_words_get_one_message(out, tmp_path, capfd):
    for words, message in (
        (["export", str(out), "--to", "egde"], "--to 'egde' is no format; did you mean 'edge'"),
        (["export", str(out)], "--to"),
        (["export", str(tmp_path / "nothing"), "--to", "edge"], "cannot be read"),
    ):
        assert cli.perform(words) == 2
        err = capfd.readouterr().err
        assert message in err
        assert "Traceback" not in err
