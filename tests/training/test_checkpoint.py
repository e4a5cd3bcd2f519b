from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from compress.training import checkpoint

KINDS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (), (0, 4), (7,)]
    found = [torch.randn(s, generator=generator).to(k) for s, k in zip(shapes, KINDS, strict=True)]
    return {f"now.{place}": value for place, value in enumerate(found)} | {"turned": found[0].T}


def written(path, found, given=None):
    shapes = {name: (value.dtype, list(value.shape)) for name, value in found.items()}
    checkpoint.write(path, '{"step": 3}', shapes, found.values() if given is None else given)


def test_a_checkpoint_is_what_safetensors_reads(tmp_path):
    found, path = tensors(), tmp_path / "folder" / "run.safetensors"
    written(path, found)
    read = load_file(path)
    assert {name: value.dtype for name, value in read.items()} == {n: v.dtype for n, v in found.items()}
    assert all(torch.equal(read[name], value) for name, value in found.items())
    with ExitStack() as stack:
        stored = checkpoint.open_checkpoint(path, stack)
        assert (stored.state, stored.names) == ('{"step": 3}', set(found))
        assert all(torch.equal(stored.read(name), value) for name, value in found.items())
    assert [one.name for one in path.parent.iterdir()] == ["run.safetensors"]


def test_a_tensor_is_asked_for_after_the_one_before_was_written(tmp_path):
    path, found = tmp_path / "run.safetensors", {"a": torch.ones(70_000), "b": torch.ones(3)}

    def one_by_one():
        yield found["a"]
        assert path.with_suffix(".part").stat().st_size >= found["a"].nbytes
        yield found["b"]

    written(path, found, one_by_one())
    assert torch.equal(load_file(path)["b"], found["b"])


def test_what_is_in_pieces_or_no_checkpoint_is_none(tmp_path):
    path = tmp_path / "run.safetensors"
    with ExitStack() as stack:
        assert checkpoint.open_checkpoint(path, stack) is None
        written(path, tensors())
        path.write_bytes(path.read_bytes()[:-1])
        assert checkpoint.open_checkpoint(path, stack) is None


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path):
    path = tmp_path / "run.safetensors"
    written(path, tensors())
    before = path.read_bytes()

    def broken():
        yield torch.zeros(2)
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        written(path, {"a": torch.zeros(2), "b": torch.zeros(2)}, broken())
    assert path.read_bytes() == before
