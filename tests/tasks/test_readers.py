import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from compress.errors import CompressError
from compress.tasks.readers import Table, read, suffix_of


def table(path):
    parts = read(path)
    assert list(parts) == [""]
    return parts[""]


def write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


ROWS = {"text": ["hello, there", 'say "yes"'], "label": ["0", "1"]}
ROWS_AS_OBJECTS = [{"text": t, "label": n} for t, n in zip(*ROWS.values(), strict=True)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'text,label\n"hello, there",0\n"say ""yes""",1\n'),
        ("a.csv", 'text;label\nhello, there;0\n"say ""yes""";1\n'),
        ("a.csv", 'text|label\nhello, there|0\n"say ""yes""";1\n'.replace('";1', '"|1')),
        ("a.csv", 'text\tlabel\nhello, there\t0\nsay "yes"\t1\n'),
        ("a.tsv", 'text\tlabel\nhello, there\t0\nsay "yes"\t1\n'),
        ("a.tsv", 'text\tlabel\r\nhello, there\t0\r\n\r\nsay "yes"\t1\r\n'),
        ("a.csv", '\ufefftext,label\n"hello, there",0\n\n"say ""yes""",1'),
        ("a.jsonl", '{"text": "hello, there", "label": "0"}\n\n{"text": "say \\"yes\\"", "label": "1"}'),
        ("a.json", json.dumps(ROWS_AS_OBJECTS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"data": ROWS_AS_OBJECTS})),
    ],
)
def test_every_way_to_write_a_table_gives_the_same_columns(tmp_path, name, text):
    found = table(write(tmp_path / name, text))
    assert {key: list(cells) for key, cells in found.columns.items()} == ROWS
    assert len(found) == 2


def test_parquet_and_packed_files_give_the_same_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table(ROWS), tmp_path / "a.parquet")
    text = b'text,label\n"hello, there",0\n"say ""yes""",1\n'
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text, mtime=0))
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress(text))
    for name in ("a.parquet", "a.csv.gz", "a.csv.xz"):
        assert {k: list(v) for k, v in table(tmp_path / name).columns.items()} == ROWS


def test_suffixes_are_read_through_packing():
    assert [suffix_of(Path(n)) for n in ("a.CSV.gz", "b.tsv.xz", "c.json")] == [".csv", ".tsv", ".json"]


def test_a_line_separator_inside_a_field_ends_no_row(tmp_path):
    found = table(write(tmp_path / "a.tsv", "text\tlabel\na\u2028b\x0bc\t1\n"))
    assert found.columns["text"] == ["a\u2028b\x0bc"]


def test_a_tab_file_with_quoted_tabs_is_read_with_quotes(tmp_path):
    found = table(write(tmp_path / "a.tsv", 'text\tlabel\n"a\tb"\t1\nc\t0\n'))
    assert found.columns["text"] == ["a\tb", "c"]


def test_lines_are_those_of_the_file_across_quoted_line_breaks(tmp_path):
    found = table(write(tmp_path / "a.csv", 'text,label\n"two\nlines",0\nb,1\n'))
    assert found.columns["text"] == ["two\nlines", "b"]
    assert [found.where(row) for row in (0, 1)] == ["a.csv line 2", "a.csv line 4"]


def test_a_first_row_with_a_number_is_data_and_columns_are_numbered(tmp_path):
    found = table(write(tmp_path / "a.tsv", "gj04\t1\tgood\ngj04\t0\tbad\n"))
    assert list(found.columns) == ["column 1", "column 2", "column 3"]
    assert found.columns["column 3"] == ["good", "bad"]
    assert found.lines == [1, 2]


def test_an_unnamed_index_column_keeps_the_header(tmp_path):
    found = table(write(tmp_path / "a.csv", ",text\n0,a\n1,b\n"))
    assert list(found.columns) == ["column 1", "text"]


def test_json_with_one_list_per_split_is_divided(tmp_path):
    words = {"train": [["a", "x"], ["b", "y"]], "val": [["c", "x"]], "oos_train": []}
    found = read(write(tmp_path / "a.json", json.dumps(words)))
    assert {name: list(part.columns["column 1"]) for name, part in found.items()} == {
        "calibration": ["a", "b"],
        "validation": ["c"],
    }
    assert found["validation"].place == "a.json:val"


def test_lines_of_plain_text_are_rows_that_keep_their_ends(tmp_path):
    found = table(write(tmp_path / "a.txt", "one\n\ntwo\n"))
    assert found.plain
    assert found.columns["text"] == ["one\n", "\n", "two\n"]


def test_json_strings_are_texts(tmp_path):
    assert table(write(tmp_path / "a.json", '["a", "b"]')).columns["text"] == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("x", "y"), [""]),
        (("IMAGES", "labels"), [""]),
        (("x_train", "y_train", "x_test", "y_test"), ["calibration", "test"]),
        (("train_images", "train_labels", "val_images", "val_labels"), ["calibration", "validation"]),
    ],
)
def test_arrays_are_found_by_their_usual_names(tmp_path, names, splits):
    pictures = np.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).astype(np.uint8)
    arrays = {n: pictures if "x" in n or "mage" in n.lower() else np.array([[3], [5]]) for n in names}
    np.savez(tmp_path / "a.npz", **arrays)
    found = read(tmp_path / "a.npz")
    assert list(found) == splits
    for part in found.values():
        assert np.array_equal(part.columns["image"], pictures)
        assert part.columns["label"] == [3, 5]


def test_taken_rows_keep_their_lines_and_their_kind():
    whole = Table("a.csv", {"t": ["a", "b", "c"]}, [2, 3, 5], "line", plain=True, ordered=True)
    part = whole.take([2, 0])
    assert part == Table("a.csv", {"t": ["c", "a"]}, [5, 2], "line", plain=True, ordered=True)
    assert part.where(0) == "a.csv line 5"


def test_an_unknown_column_is_answered_with_the_nearest():
    whole = Table("a.csv", {"sentence": ["a"], "label": ["0"]}, [2])
    assert whole.column("label") == ["0"]
    with pytest.raises(CompressError, match=r"no column 'sentense'; did you mean 'sentence'\? Columns: s"):
        whole.column("sentense")
    with pytest.raises(CompressError, match=r"no column 'zzz'\. Columns: sentence, label"):
        whole.column("zzz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"text,label\na,1\nb,2,3\n",
            r"a.csv line 3 has 3 fields.* has 2 \(text, label\).*','",
        ),
        ("a.tsv", b"text\tlabel\na\t1\nb\n", r"a.tsv line 3 has 1 fields.* has 2"),
        ("a.csv", b'text,label\n"a"b,1\n', r"a.csv line 2: .*quote inside"),
        ("a.csv", b'text,label\na,1\n"b,1\n', r"a.csv line 3: .*quote inside"),
        ("a.csv", b"text,text\na,1\n", r"two columns named 'text'"),
        ("a.csv", b"", r"a.csv is empty"),
        ("a.csv", b" \n\n", r"a.csv is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"a": 1, "b": 2}\n\n{"a": 3}\n', r"a.jsonl line 3 lacks 'b'"),
        ("a.json", b"[]", r"a.json is empty"),
        ("a.json", b'{"a": 1}', r"neither a list of rows nor an object of columns"),
        ("a.json", b'{"a": [1], "b": [1, 2]}', r"different lengths: \{'a': 1, 'b': 2\}"),
        ("a.json", b'[\n{"a": 1}\n{"a"', r"a.json line 3 is not JSON.*\.jsonl"),
        ("a.csv", b"text\nab\n\xff\n", r"a.csv line 3 is not UTF-8 \(byte 0xff\)"),
        ("a.csv.gz", b"no gzip", r"damaged archive"),
        ("a.csv.gz", gzip.compress(b"text,label\na,1\n" * 50, mtime=0)[:30], r"damaged archive"),
        ("a.csv.xz", b"no xz", r"damaged archive"),
        ("a.parquet", b"no parquet", r"not a readable Parquet"),
        ("a.npz", b"no npz", r"not a readable .npz"),
        ("a.pkl", b"", r"of no known kind; give one of .csv"),
    ],
)
def test_a_faulty_file_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressError, match=message):
        read(tmp_path / name)


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    write(tmp_path / "train.csv", "text\na\n")
    with pytest.raises(CompressError, match=r"trian\.csv does not exist; did you mean train\.csv\?"):
        read(tmp_path / "trian.csv")
    with pytest.raises(CompressError, match=r"b\.csv does not exist$"):
        read(tmp_path / "nowhere" / "b.csv")


def test_faulty_arrays_are_refused(tmp_path):
    bad = np.ones((3, 1, 2, 2), np.float32)
    bad[1, 0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", x=bad, y=[0, 1, 0])
    np.savez(tmp_path / "ragged.npz", x=np.ones((3, 2, 2)), y=[0, 1])
    np.savez(tmp_path / "names.npz", pictures=np.ones((3, 2, 2)))
    np.savez(tmp_path / "objects.npz", x=np.array([{}, None]))
    for name, message in [
        ("nan", r"nan.npz row 2: an image holds NaN"),
        ("ragged", r"different lengths: \{'image': 3, 'label': 2\}"),
        ("names", r"has arrays pictures; name them x and y"),
        ("objects", r"not a readable .npz of plain arrays"),
    ]:
        with pytest.raises(CompressError, match=message):
            read(tmp_path / f"{name}.npz")


def test_a_long_document_is_one_field(tmp_path):
    document = "word " * 40_000
    assert table(write(tmp_path / "a.csv", f"text,label\n{document},1\n")).columns["text"] == [document]
