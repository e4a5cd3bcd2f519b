import itertools
import json

import numpy as np
import pytest
from PIL import Image

from compress.errors import CompressError
from compress.tasks import datasets
from compress.tasks.datasets import read_splits
from compress.tasks.readers import Table

NAMES = {0: "off", 1: "on"}
UNNAMED = {0: "LABEL_0", 1: "LABEL_1"}


def table(**columns):
    rows = len(next(iter(columns.values())))
    return Table("a.csv", columns, range(2, rows + 2), "line")


def write(path, rows, start=0):
    lines = "".join(f"row {number},{number % 2}\n" for number in range(start, start + rows))
    path.write_text("text,label\n" + lines)
    return str(path)


def texts_of(splits):
    return {name: list(part.columns["text"]) for name, part in splits.tables.items()}


def test_one_file_is_cut_in_three_without_overlap_and_the_same_every_time(tmp_path):
    path = write(tmp_path / "a.csv", 40)
    first, again = texts_of(read_splits(path)), texts_of(read_splits(path))
    assert first == again
    assert {name: len(rows) for name, rows in first.items()} == {
        "calibration": 28,
        "validation": 4,
        "test": 8,
    }
    assert sorted(itertools.chain(*first.values())) == sorted(f"row {number}" for number in range(40))
    assert texts_of(read_splits(path, seed=1)) != first
    numbers = [int(text.split()[1]) for text in first["calibration"]]
    assert numbers != sorted(numbers)


def test_running_text_is_cut_in_order(tmp_path):
    found = read_splits(write(tmp_path / "a.csv", 20), shuffle=False)
    assert texts_of(found) == {
        "calibration": [f"row {number}" for number in range(14)],
        "validation": ["row 14", "row 15"],
        "test": ["row 16", "row 17", "row 18", "row 19"],
    }
    assert found.origin["test"] == "a.csv, the last 1/5, held out"


def test_the_origin_says_where_each_split_came_from(tmp_path):
    origin = read_splits(write(tmp_path / "a.csv", 40)).origin
    assert origin == {
        "calibration": "a.csv, 28 of 40 rows",
        "validation": "a.csv, a random 1/10, held out",
        "test": "a.csv, a random 1/5, held out",
    }


def test_files_of_a_directory_are_used_whole(tmp_path):
    for place, (name, rows) in enumerate({"train": 12, "dev": 5, "test": 3}.items()):
        write(tmp_path / f"{name}.csv", rows, 100 * place)
    (tmp_path / "config.json").write_text("{}")
    found = read_splits(str(tmp_path))
    assert {name: sorted(rows) for name, rows in texts_of(found).items()} == {
        "calibration": sorted(f"row {number}" for number in range(12)),
        "validation": [f"row {number}" for number in range(100, 105)],
        "test": [f"row {number}" for number in range(200, 203)],
    }
    assert found.origin["validation"] == "dev.csv, whole"


def test_without_a_test_file_the_validation_file_is_the_test(tmp_path):
    write(tmp_path / "train.csv", 20)
    write(tmp_path / "valid.csv", 3, 100)
    found = read_splits(str(tmp_path))
    assert sorted(texts_of(found)["test"]) == ["row 100", "row 101", "row 102"]
    assert len(found.tables["validation"]) == 2
    assert found.origin == {
        "calibration": "train.csv, 18 of 20 rows",
        "validation": "train.csv, a random 1/10, held out",
        "test": "valid.csv, whole",
    }


def test_a_named_test_file_comes_before_one_in_the_directory(tmp_path):
    write(tmp_path / "train.csv", 20)
    write(tmp_path / "test.csv", 3, 100)
    other = write(tmp_path / "other.csv", 2, 200)
    found = read_splits(str(tmp_path), other)
    assert sorted(texts_of(found)["test"]) == ["row 200", "row 201"]
    assert found.origin["test"] == "other.csv, whole"
    single = read_splits(write(tmp_path / "one.csv", 10), other)
    assert {name: len(part) for name, part in single.tables.items()} == {
        "calibration": 9,
        "validation": 1,
        "test": 2,
    }


def test_a_directory_with_one_split_or_one_file_is_cut(tmp_path):
    for name in ("dev.csv", "anything.csv"):
        folder = tmp_path / name[:-4]
        folder.mkdir()
        write(folder / name, 20)
        assert [len(part) for part in read_splits(str(folder)).tables.values()] == [14, 2, 4]


def test_shards_are_joined(tmp_path):
    write(tmp_path / "train-00000-of-00002.csv", 8)
    write(tmp_path / "train-00001-of-00002.csv", 8, 100)
    write(tmp_path / "test.csv", 2, 200)
    found = read_splits(str(tmp_path))
    assert len(found.tables["calibration"]) + len(found.tables["validation"]) == 16
    assert found.origin["calibration"] == "train-00000-of-00002.csv and 1 more, 15 of 16 rows"


@pytest.mark.parametrize(
    "names",
    [("dev.csv", "validation.csv"), ("dev.csv", "dev.tsv"), ("dev-00000-of-00001.csv", "val.csv")],
)
def test_two_tables_of_one_split_are_refused_not_joined(tmp_path, names):
    write(tmp_path / "train.csv", 20)
    for name in names:
        write(tmp_path / name, 4)
    with pytest.raises(CompressError, match=rf"holds {names[0]} and {names[1]}, and each says validation"):
        read_splits(str(tmp_path))


def test_two_image_folders_of_one_split_are_refused(tmp_path):
    for name in ("train", "val", "valid"):
        (tmp_path / name / "cat").mkdir(parents=True)
    with pytest.raises(CompressError, match="holds val and valid, and each says validation"):
        read_splits(str(tmp_path))


@pytest.mark.parametrize("nested", [False, True])
def test_an_image_folder_has_one_class_per_directory(tmp_path, nested):
    for split in ("train", "test") if nested else (".",):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (4, 4)).save(tmp_path / split / name / f"{number}.png")
            (tmp_path / split / name / "notes.md").write_text("no image")
    found = read_splits(str(tmp_path))
    assert [len(part) for part in found.tables.values()] == ([9, 1, 10] if nested else [7, 1, 2])
    for part in found.tables.values():
        assert part.ordered
        for path, label in zip(part.columns["image"], part.columns["label"], strict=True):
            assert path.parent.name == label
            assert path.suffix == ".png"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no data file; name the files train"),
        ({"a.csv": "text\na\n", "b.csv": "text\na\n"}, r"holds a.csv, b.csv; name the files train"),
        ({"train.csv": "text,label\n"}, r"train.csv has a header and no rows"),
        ({"train.csv": "text,label\na,1\n"}, r"train.csv has 1 rows, too few to cut a test.*10 rows"),
        ({"sub/readme.md": "x"}, r"no sub-directory with images"),
        ({"train.json": json.dumps({"train": ["a"]})}, r"is divided into calibration"),
    ],
)
def test_a_directory_that_cannot_be_used_is_explained(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(CompressError, match=message):
        read_splits(str(tmp_path))


def test_data_that_is_nothing_but_tests_cannot_calibrate(tmp_path):
    path = write(tmp_path / "test.csv", 20)
    with pytest.raises(CompressError, match=r"no training rows"):
        read_splits(str(tmp_path), path)


def test_text_columns_are_found_by_name_by_pair_and_by_length():
    assert datasets.text_columns(table(Label=["0"], Text=["a"])) == ("Text",)
    assert datasets.text_columns(table(id=["a rather long id"], sentence=["a"])) == ("sentence",)
    assert datasets.text_columns(table(sentence2=["b"], sentence1=["a"])) == ("sentence1", "sentence2")
    assert datasets.text_columns(table(a=["x", "y"], b=["longer", "words"], c=[10**20, 1])) == ("b",)
    assert datasets.text_columns(table(a=["x"], b=["y"]), "a") == ("a",)
    assert datasets.text_columns(table(a=["x"], b=["y"]), "b,a") == ("b", "a")
    assert datasets.text_columns(Table("a", {"a,b": ["x"]}, [1]), "a,b") == ("a,b",)


def test_a_text_column_that_is_not_there_is_explained():
    with pytest.raises(CompressError, match=r"no column 'txt'; did you mean 'text'"):
        datasets.text_columns(table(text=["a"]), "txt")
    with pytest.raises(CompressError, match=r"no column of text among n; name it, --text"):
        datasets.text_columns(table(n=[1]))
    with pytest.raises(CompressError, match=r"names 3 columns"):
        datasets.text_columns(table(a=["x"], b=["x"], c=["x"]), "a,b,c")


def test_label_columns_are_found_by_name_and_by_what_fits():
    assert datasets.label_column(table(t=["a"], Intent=["x"]), ("t",), NAMES) == "Intent"
    fitting = table(t=["a", "b", "c"], source=["s", "s", "s"], mark=["off", "on", "off"], n=["7", "8", "9"])
    assert datasets.label_column(fitting, ("t",), NAMES) == "mark"
    constant = table(t=["a", "b"], batch=["0", "0"], grade=["0", "1"])
    assert datasets.label_column(constant, ("t",), NAMES) == "grade"
    assert datasets.label_column(table(t=["a", "b"], kind=["no", "yes"]), ("t",), NAMES) == "kind"
    assert datasets.label_column(table(label=["a"], other=["x"]), ("label",), NAMES, "other") == "other"
    assert datasets.label_column(table(label=["a"], n=["0"]), ("label",), NAMES) == "n"


def test_a_label_column_that_is_not_there_is_explained():
    with pytest.raises(CompressError, match=r"no column 'lable'; did you mean 'label'"):
        datasets.label_column(table(t=["a"], label=["x"]), ("t",), NAMES, "lable")
    with pytest.raises(CompressError, match=r"no column of labels among t, id; name it, --label"):
        datasets.label_column(table(t=["a"] * 3, id=["x", "y", "z"]), ("t",), NAMES)


def test_score_columns_are_found_only_when_they_are_there():
    pair = table(a=["x"], b=["y"], score=["1"])
    assert datasets.score_column(pair, ("a", "b")) == "score"
    assert datasets.score_column(table(a=["x"], b=["y"]), ("a", "b")) is None
    assert datasets.score_column(pair, ("a", "b"), "b") == "b"
    with pytest.raises(CompressError, match=r"no column 'scor'"):
        datasets.score_column(pair, ("a", "b"), "scor")


@pytest.mark.parametrize("cell", ["", "  ", None, float("nan")])
def test_an_empty_text_is_refused_with_its_line(cell):
    with pytest.raises(CompressError, match=r"a.csv line 3 has no text in column 't'; remove"):
        datasets.texts(table(t=["fine", cell]), "t")


def test_a_text_that_is_none_is_refused_and_others_are_kept():
    assert datasets.texts(table(t=["nan", " b"]), "t") == ["nan", " b"]
    with pytest.raises(CompressError, match=r"line 2 has 3\.5, not text, in column 't'"):
        datasets.texts(table(t=[3.5]), "t")
    plain = Table("a.txt", {"text": ["a\n", "\n"]}, [1, 2], "line", plain=True)
    assert datasets.texts(plain, "text") == ["a\n", "\n"]


def test_numbers_are_read_and_nan_is_refused():
    assert datasets.numbers(table(s=["1.5", 2]), "s") == [1.5, 2.0]
    for bad in ("x", "nan", float("inf"), None):
        with pytest.raises(CompressError, match=r"line 3 has .* in column 's', not a finite number"):
            datasets.numbers(table(s=["1", bad]), "s")


@pytest.mark.parametrize(
    ("cells", "labels", "numbers"),
    [
        (["on", "off", "on"], NAMES, [1, 0, 1]),
        (["ON", " off "], NAMES, [1, 0]),
        (["1", "0"], NAMES, [1, 0]),
        ([1, 0, True, False], NAMES, [1, 0, 1, 0]),
        ([1.0, "0.0"], UNNAMED, [1, 0]),
        ([np.int64(1)], UNNAMED, [1]),
        (["2", "1"], {0: "1", 1: "2"}, [1, 0]),
        (["LABEL_1"], UNNAMED, [1]),
    ],
)
def test_labels_are_matched_by_name_then_by_number(cells, labels, numbers):
    assert datasets.label_numbers(table(y=cells), "y", labels) == numbers


@pytest.mark.parametrize(
    ("cell", "labels", "message"),
    [
        (
            "onn",
            NAMES,
            r"line 3 has label 'onn' in column 'y', .*2 labels: .*off, on; did you mean 'on'\?",
        ),
        ("zzz", NAMES, r"label 'zzz'.*name another column with --label"),
        (2, UNNAMED, r"label 2 .*integers 0 to 1; .*id2label"),
        (-1, NAMES, r"label -1 "),
        (0.5, UNNAMED, r"label 0\.5"),
        ("inf", UNNAMED, r"label 'inf'"),
        ("", NAMES, r"line 3 has no label in column 'y'"),
        (None, NAMES, r"line 3 has no label"),
        (float("nan"), NAMES, r"line 3 has no label"),
    ],
)
def test_a_label_that_the_model_does_not_know_is_refused(cell, labels, message):
    with pytest.raises(CompressError, match=message):
        datasets.label_numbers(table(y=["0", cell]), "y", labels)


def test_folders_stand_for_unnamed_labels_in_sorted_order():
    folder = Table("d", {"label": ["dog", "cat"]}, [1, 2], "image", ordered=True)
    assert datasets.label_numbers(folder, "label", UNNAMED) == [1, 0]
    assert datasets.label_numbers(folder, "label", {0: "dog", 1: "cat"}) == [0, 1]
    digits = Table("d", {"label": ["1", "0"]}, [1, 2], "image", ordered=True)
    assert datasets.label_numbers(digits, "label", UNNAMED) == [1, 0]
    with pytest.raises(CompressError, match=r"d image 1 has label 'dog'"):
        datasets.label_numbers(folder, "label", {**UNNAMED, 2: "LABEL_2"})
    with pytest.raises(CompressError, match=r"label 'dog'"):
        datasets.label_numbers(table(label=["dog", "cat"]), "label", UNNAMED)
