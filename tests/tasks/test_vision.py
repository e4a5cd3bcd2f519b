import io
import json

import numpy as np
import pytest
from PIL import Image
from support import tiny
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from compress.errors import CompressError
from compress.tasks.loading import load_task
from compress.tasks.vision import open_image, read_preprocessing

NOISE = np.random.default_rng(0).integers(0, 256, (20, 12, 3), np.uint8)


def preprocess(directory, pixels=NOISE, **rules):
    (directory / "preprocessor_config.json").write_text(json.dumps(rules))
    return read_preprocessing(directory)(Image.fromarray(pixels))


def test_pixel_values_are_those_of_transformers(tmp_path):
    rules = {
        "size": {"height": 8, "width": 6},
        "resample": 3,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    expected = ViTImageProcessorPil(**rules)(NOISE, return_tensors="np")["pixel_values"][0]
    found = preprocess(tmp_path, **rules)
    assert found.dtype == np.float32
    assert found.shape == (3, 8, 6)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_steps_that_are_switched_off_are_not_taken(tmp_path):
    off = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    assert np.array_equal(preprocess(tmp_path, **off), NOISE.transpose(2, 0, 1))
    scaled = preprocess(tmp_path, do_resize=False, do_normalize=False)
    np.testing.assert_allclose(scaled, NOISE.transpose(2, 0, 1) / 255, rtol=1e-6)
    flipped = preprocess(tmp_path, **off, do_flip_channel_order=True)
    assert np.array_equal(flipped, NOISE.transpose(2, 0, 1)[::-1])
    scaled = preprocess(tmp_path, do_resize=False, do_normalize=False, rescale_factor=2)
    assert np.array_equal(scaled, NOISE.transpose(2, 0, 1) * 2.0)


@pytest.mark.parametrize(
    ("rules", "shape"),
    [
        ({"size": 5}, (5, 5)),
        ({"size": [5, 7]}, (5, 7)),
        ({"size": {"shortest_edge": 6}}, (10, 6)),
        ({"size": {"shortest_edge": 6}, "do_center_crop": True, "crop_size": 4}, (4, 4)),
        ({"size": 9, "do_center_crop": True, "crop_size": {"height": 3, "width": 5}}, (3, 5)),
        ({"size": 9, "do_center_crop": True, "crop_size": {"shortest_edge": 3}}, (3, 3)),
        ({"size": {"shortest_edge": 8}, "crop_pct": 0.8}, (8, 8)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.8}, (384, 384)),
        ({"image_processor": {"size": 4}}, (4, 4)),
        ({"do_center_crop": True}, (224, 224)),
    ],
)
def test_sizes_are_read_in_every_form(tmp_path, rules, shape):
    assert preprocess(tmp_path, **rules).shape == (3, *shape)


def test_the_shortest_edge_of_a_wide_picture_is_its_height(tmp_path):
    wide = preprocess(tmp_path, NOISE.transpose(1, 0, 2), size={"shortest_edge": 6})
    assert wide.shape == (3, 6, 10)


def test_the_middle_is_kept_and_black_is_put_around_what_is_small(tmp_path):
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_center_crop": True}
    small = preprocess(tmp_path, **plain, crop_size={"height": 4, "width": 6})
    assert np.array_equal(small, NOISE.transpose(2, 0, 1)[:, 8:12, 3:9])
    large = preprocess(tmp_path, **plain, crop_size={"height": 20, "width": 16})
    assert np.array_equal(large[:, :, 2:14], NOISE.transpose(2, 0, 1))
    assert not large[:, :, :2].any()
    assert not large[:, :, 14:].any()


def test_convnext_resizes_a_little_larger_and_cuts_the_middle(tmp_path):
    plain = {"do_rescale": False, "do_normalize": False}
    found = preprocess(tmp_path, **plain, size={"shortest_edge": 8}, crop_pct=0.8)
    larger = preprocess(tmp_path, **plain, size={"height": 16, "width": 10})
    assert np.array_equal(found, larger[:, 4:12, 1:9])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"preprocessor_config.json does not describe an image processor"),
        ("[]", r"does not describe an image processor"),
        ('{"size": {"longest_edge": 3}}', r"size \{'longest_edge': 3\} is neither"),
        ('{"do_pad": true}', r"do_pad is not supported"),
    ],
)
def test_faulty_rules_are_explained(tmp_path, text, message):
    assert read_preprocessing(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CompressError, match=message):
        read_preprocessing(tmp_path)


def test_a_picture_is_opened_from_a_path_from_bytes_and_from_arrays(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    packed = io.BytesIO()
    Image.fromarray(NOISE).save(packed, "png")
    cells = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        packed.getvalue(),
        {"bytes": packed.getvalue(), "path": None},
        NOISE,
        NOISE.transpose(2, 0, 1),
    ]
    for cell in cells:
        assert np.array_equal(np.asarray(open_image(cell, "here", 3)), NOISE)


def test_gray_pictures_take_the_color_mode_of_the_model():
    for gray in (NOISE[..., 0], NOISE[..., :1], NOISE[None, ..., 0]):
        assert np.array_equal(np.asarray(open_image(gray, "here", 1)), NOISE[..., 0])
        color = np.asarray(open_image(gray, "here", 3))
        assert np.array_equal(color, np.repeat(NOISE[..., :1], 3, -1))


@pytest.mark.parametrize("cell", [b"no image", "no/such/file.png", np.zeros((4, 4), int), None])
def test_what_is_no_picture_is_named(cell):
    with pytest.raises(CompressError, match=r"a row 3 is not a readable image"):
        open_image(cell, "a row 3", 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.vision(tmp_path_factory.mktemp("models") / "vision")


def arrays(path, dtype=np.uint8, side=8, count=20):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 3, side, side)).astype(dtype)
    np.savez(path, x=pixels, y=np.arange(count) % 3)
    return str(path)


def test_every_picture_is_seen_once_with_its_label(saved, tmp_path):
    path = arrays(tmp_path / "a.npz")
    task = load_task(str(saved), path)
    assert (task.name, task.metric, task.samples["test"]) == ("image-classification", "accuracy", 4)
    pixels = np.load(path)["x"]
    seen = []
    for split, count in task.samples.items():
        batches = list(task.batches(split, 3))
        assert [len(batch.labels) for batch in batches[:-1]] == [3] * (len(batches) - 1)
        assert sum(len(batch.labels) for batch in batches) == count
        for batch in batches:
            assert batch.real is None
            for values, label in zip(batch.inputs["pixel_values"], batch.labels, strict=True):
                raw = np.rint((values.numpy() * 0.5 + 0.5) * 255).astype(np.uint8)
                row = next(at for at in range(20) if np.array_equal(pixels[at], raw))
                assert row % 3 == label
                seen.append(row)
    assert sorted(seen) == list(range(20))
    assert sum(len(batch.labels) for batch in task.batches("calibration", 4, 6)) == 6
    assert task.example(2, 99)["pixel_values"].shape == (2, 3, 8, 8)


def test_the_score_is_the_fraction_that_is_right(saved, tmp_path):
    task = load_task(str(saved), arrays(tmp_path / "a.npz"))
    labels = np.concatenate([batch.labels.numpy() for batch in task.batches("test", 32)])
    answers = iter(np.eye(3)[np.append(labels[:-1], (labels[-1] + 1) % 3)])
    assert task.score(lambda inputs: np.stack([next(answers) for _ in inputs["pixel_values"]])) == 0.75


def test_float_arrays_are_pixel_values_already(saved, tmp_path):
    path = arrays(tmp_path / "a.npz", np.float64)
    batch = next(load_task(str(saved), path).batches("test", 1))
    assert any(np.array_equal(batch.inputs["pixel_values"][0], row) for row in np.load(path)["x"])


def test_image_folders_are_scored_by_their_names(saved, tmp_path):
    for name in ("bird", "cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.fromarray(NOISE).save(tmp_path / name / f"{number}.png")
    task = load_task(str(saved), str(tmp_path))
    labels = [int(n) for split in task.samples for b in task.batches(split, 2) for n in b.labels]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    (tmp_path / "cow").mkdir()
    Image.fromarray(NOISE).save(tmp_path / "cow" / "0.png")
    with pytest.raises(CompressError, match=r"has label 'cow' in column 'label'.*cat, dog, bird"):
        load_task(str(saved), str(tmp_path))


def test_a_size_that_the_model_does_not_take_is_told_at_once(saved, tmp_path):
    with pytest.raises(CompressError, match=r"\[3, 9, 9\] pixel values, but the model takes \[3, 8, 8\]"):
        load_task(str(saved), arrays(tmp_path / "a.npz", np.float32, side=9))
    assert load_task(str(saved), arrays(tmp_path / "a.npz", side=9)).samples["test"] == 4


def test_pictures_without_rules_are_refused(saved, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((saved / name).read_bytes())
    with pytest.raises(CompressError, match=r"no preprocessor_config.json"):
        load_task(str(bare), arrays(tmp_path / "a.npz"))


def test_the_rules_are_saved_beside_the_model(saved, tmp_path):
    task = load_task(str(saved), arrays(tmp_path / "a.npz"))
    (tmp_path / "out").mkdir()
    task.save_files(tmp_path / "out")
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["preprocessor_config.json"]
    assert read_preprocessing(tmp_path / "out") == read_preprocessing(saved)
