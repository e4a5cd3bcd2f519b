import json

import pytest

from compress import artifacts
from compress.errors import CompressError
from compress.ir import Slice


def made(width=1):
    return Slice(tensor="w", dim=0, width=width)


def test_a_stored_document_is_used_while_its_origin_matches(tmp_path):
    path = tmp_path / "a.json"
    assert artifacts.saved(path, Slice, "one", lambda: made(1)) == made(1)
    assert artifacts.saved(path, Slice, "one", lambda: made(2)) == made(1)
    assert artifacts.saved(path, Slice, "two", lambda: made(3)) == made(3)
    assert artifacts.saved(path, Slice, "two", lambda: made(4)) == made(3)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema_version": 1}', "\x00\x01"])
def test_a_damaged_file_is_rebuilt_not_trusted(tmp_path, damage):
    path = tmp_path / "a.json"
    path.write_text(damage)
    assert artifacts.saved(path, Slice, "one", made) == made()
    assert artifacts.stored_at(path, Slice, "one") == made()


def test_values_that_break_the_schema_and_other_schema_versions_are_not_trusted(tmp_path):
    path = tmp_path / "a.json"
    artifacts.store(path, "one", made())
    good = json.loads(path.read_text())
    for change in (
        {"value": {"tensor": "w"}},
        {"value": {**good["value"], "extra": 1}},
        {"schema_version": 9},
    ):
        path.write_text(json.dumps({**good, **change}))
        assert artifacts.stored_at(path, Slice, "one") is None


def test_equal_contents_have_equal_digests_and_any_change_another():
    assert artifacts.digest("a", 1) == artifacts.digest("a", 1)
    different = [
        artifacts.digest(*p) for p in (("a",), ("b",), ("a", "b"), ("ab",), (b"a",), (made(1),), (made(2),))
    ]
    assert len(set(different)) == len(different)


def test_a_folder_of_another_origin_is_emptied(tmp_path):
    directory = artifacts.folder(tmp_path / "d", "one")
    (directory / "x").write_text("kept")
    assert (artifacts.folder(directory, "one") / "x").read_text() == "kept"
    assert not (artifacts.folder(directory, "two") / "x").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    artifacts.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        artifacts.write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_output_directory_that_is_not_ours_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CompressError, match=r"not an output of compress.*thesis\.tex"):
        artifacts.claim(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert artifacts.claim(tmp_path / "new") == tmp_path / "new" / "compression"
    assert artifacts.claim(tmp_path / "new").is_dir()
    with pytest.raises(CompressError, match="is a file"):
        artifacts.claim(tmp_path / "thesis.tex")
    with pytest.raises(CompressError, match="cannot be written"):
        artifacts.claim(tmp_path / "thesis.tex" / "below")
