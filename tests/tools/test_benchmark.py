"""The benchmarks run from end to end on a handful of data, and count what they say they count."""

import gzip
import importlib
import json
import lzma
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny

from compress.core.sltrain import account, dense_account
from compress.errors import CompressError

TOOLS = Path(__file__).parents[2] / "tools"


def tool(monkeypatch, name):
    """A module below tools/, imported as the scripts there import it."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module(name)


def run(monkeypatch, tmp_path, *words):
    """The rows that `tools/benchmark.py` writes."""
    benchmark = tool(monkeypatch, "benchmark")
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words, "--threads", "1", "--json", str(file)])
    benchmark.main()
    found = json.loads(file.read_text())
    assert found["benchmark"] == words[0]
    return found["rows"]


@pytest.fixture
def wikitext(tmp_path):
    """A directory with a text of few words that repeats."""
    (tmp_path / "wikitext2").mkdir()
    for name, lines in (("train", 200), ("valid", 40)):
        with gzip.open(tmp_path / "wikitext2" / f"{name}.txt.gz", "wt", encoding="utf-8") as file:
            for number in range(lines):
                file.write(f" the cat {number % 7} sees the dog {number % 5} and the bird does not \n")
    return tmp_path


@pytest.mark.slow
def test_sltrain_compares_every_method_and_counts_its_bytes(monkeypatch, wikitext):
    rows = run(monkeypatch, wikitext, "sltrain", "--data", str(wikitext), "--steps", "2")
    dense, mixed, low, same = rows
    assert [row["method"] for row in rows] == list(tool(monkeypatch, "benchmarks.sltrain").METHODS)
    assert all(1 < row["perplexity"] < 1.2 * 1024 for row in rows)
    for row in rows:
        held = sum(row[f"{part}_mb"] for part in ("weights", "indices", "gradients", "optimizer"))
        assert row["held_mb"] == pytest.approx(held, abs=2e-3)
        assert row["gradients_mb"] == pytest.approx(4 * row["parameters"] / 1e6, abs=1e-3)
        assert row["optimizer_mb"] == pytest.approx(2 * row["gradients_mb"], rel=1e-2)
    assert low["held_mb"] < mixed["held_mb"] < 0.8 * dense["held_mb"]
    assert same["parameters"] == pytest.approx(mixed["parameters"], rel=0.02)
    assert mixed["temporary_mb"] > 0 == dense["temporary_mb"]
    # The backward pass of sparse plus low rank waits for little more than the dense one.
    assert mixed["kept_for_backward_mb"] < 1.1 * dense["kept_for_backward_mb"]


def test_bytes_on_the_tensors_are_those_of_the_account(monkeypatch):
    """Formula against count: what the blocks' products hold, and everything else held alike."""
    bench = tool(monkeypatch, "benchmarks.sltrain")
    windows = torch.randint(0, bench.PIECES, (2, bench.LENGTH))
    held, formula = {}, {}
    for name, act in bench.METHODS.items():
        net = bench.model(0)
        shapes = [tuple(net.get_submodule(product).weight.shape) for product in bench.products(net)]
        act(net, 0)
        optimizer = bench.fit(net, windows.flatten(), 0, 1)
        held[name] = bench.megabytes(net, optimizer, windows)["held_mb"]
        each = {
            "dense": lambda shape: dense_account(*shape),
            "sparse + low rank": lambda shape: account(*shape, bench.RANK, bench.DENSITY),
            "low rank": lambda shape: account(*shape, bench.RANK, 0),
        }
        if name in each:
            formula[name] = sum(each[name](shape).held_bytes for shape in shapes) / 1e6
    for name in ("sparse + low rank", "low rank"):
        assert held["dense"] - held[name] == pytest.approx(formula["dense"] - formula[name], abs=2e-3)


def test_factors_alone_begin_with_a_product_that_varies_as_the_dense_weight(monkeypatch):
    bench = tool(monkeypatch, "benchmarks.sltrain")
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(300, 200)
    layer = bench.Thin(weight, 32)
    product = (layer.left @ layer.right).detach()
    assert product.std().item() == pytest.approx(weight.std().item(), rel=0.1)
    x = torch.randn(5, 200)
    assert torch.allclose(layer(x), x @ product.T, atol=1e-5)
    layer(x).square().sum().backward()
    assert float(layer.left.grad.abs().max()) > 0 < float(layer.right.grad.abs().max())


@pytest.mark.slow
def test_precision_pairs_ours_with_theirs_on_inputs_that_nothing_has_seen(monkeypatch, tmp_path):
    model = tiny.classifier(tmp_path / "model", num_hidden_layers=2, hidden_size=32, intermediate_size=64)
    drawn = random.Random(0)
    for split, count in (("train", 64), ("validation", 12), ("test", 20)):
        lines = [
            f"{' '.join(drawn.choices(tiny.WORDS, k=5))},{drawn.choice(('off', 'on'))}" for _ in range(count)
        ]
        (model / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    rows = {row["how"]: row for row in run(monkeypatch, tmp_path, "precision", "--model", str(model))}
    bench = tool(monkeypatch, "benchmarks.precision")
    assert {row["n"] for row in rows.values()} == {32}
    assert rows["float32"]["divergence"] < 1e-6 < rows["ours int8-static"]["divergence"]
    for name, row in rows.items():
        assert bool(row["ours_better_by"]) == name.startswith("onnxruntime")
    for name in bench.OURS.values():
        assert "MatMul" in str(rows[name]["products"]) or "QuantizeLinear" in str(rows[name]["products"])
        assert rows[name]["file_mb"] < rows["float32"]["file_mb"]
    # A range that is wrong shows: the ranges by other rules give other answers.
    ranged = [row["divergence"] for name, row in rows.items() if name.startswith("ours int8-static")]
    assert len(set(ranged)) >= 4


@pytest.mark.slow
def test_smoothing_is_judged_on_blocks_that_were_not_calibrated_on(monkeypatch, tmp_path):
    folder = tiny.decoder(
        tmp_path / "stories260k", num_hidden_layers=2, hidden_size=32, intermediate_size=64,
        max_position_embeddings=128,
    )  # fmt: skip
    words = random.Random(0).choices(tiny.WORDS, k=128 * 40)
    with gzip.open(folder / "tinystories_train_head.txt.gz", "wt", encoding="utf-8") as file:
        file.write(" ".join(words))
    rows = run(monkeypatch, tmp_path, "smoothing", "--data", str(tmp_path))
    dense, rest = rows[0], rows[1:]
    assert dense["n"] == 20 * 127  # half of the blocks, all tokens but each one's first
    bench = tool(monkeypatch, "benchmarks.smoothed")
    assert [row["what"] for row in rest] == [f"{kind}, {way}" for way in bench.WAYS for kind in bench.KINDS]
    for row in rest:
        assert row["lost"] == pytest.approx(row["perplexity"] - dense["perplexity"], abs=2e-4)
        assert row["low"] <= row["lost"] <= row["high"]
        assert 0 < row["divergence"] < 0.5
    assert len({row["divergence"] for row in rest}) == len(rest)


def test_a_paired_difference_is_in_points_of_the_same_inputs(monkeypatch):
    bench = tool(monkeypatch, "benchmarks.precision")
    ours = bench.Answers(np.array([True] * 90 + [False] * 10), np.zeros(100))
    theirs = bench.Answers(np.array([False] * 5 + [True] * 85 + [False] * 10), np.zeros(100))
    answers = {bench.OURS["dynamic"]: ours, "onnxruntime dynamic default": theirs}
    half = 1.96 * 100 * np.std([1] * 5 + [0] * 95, ddof=1) / 10
    assert bench._paired(answers, "onnxruntime dynamic default") == f"5.00 [{5 - half:.2f}, {5 + half:.2f}]"
    assert bench._paired(answers, bench.OURS["dynamic"]) == ""


@pytest.fixture
def cifar(tmp_path):
    """A directory with 300 random pictures to learn from and 60 held out, stored as CIFAR-10 is."""
    (tmp_path / "cifar10").mkdir()
    generator = np.random.default_rng(0)
    labels = {}
    for name, file, count in (("train", "train_1", 300), ("test", "test", 60)):
        pixels = generator.integers(0, 256, (count, 3, 32, 32), np.uint8)
        with lzma.open(tmp_path / "cifar10" / f"{file}.xz", "wb", preset=0) as out:
            out.write(pixels.tobytes())
        labels[name] = generator.integers(0, 10, count)
    np.savez(tmp_path / "cifar10" / "labels.npz", **labels)
    return tmp_path


@pytest.mark.slow
def test_gpusq_leaves_out_every_term_and_counts_packed_bytes(monkeypatch, cifar):
    words = ("--data", str(cifar), "--dense-steps", "3", "--steps", "3", "--seeds", "1", "--batch", "8")
    rows = run(monkeypatch, cifar, "gpusq", *words)
    bench = tool(monkeypatch, "benchmarks.gpusq")
    dense, bits, sparse, both, shapes = rows[:5]
    tuned = [row for row in rows[5:] if row["seed"] != "mean"]
    assert [row["what"] for row in tuned] == [*bench.TERMS]
    assert [row["what"] for row in rows if row.get("seed") == "mean"] == [*bench.TERMS]
    assert (dense["divergence"], dense["products_smaller"]) == (0, 1)
    assert min(row["divergence"] for row in (bits, sparse, both)) > 0
    # 32 bits a weight against 8; against 16 and 2 of position; against half of 8 and 1 of position.
    assert [row["weights_smaller"] for row in (bits, sparse)] == [4.0, 1.88]
    assert {row["weights_smaller"] for row in (both, shapes, *tuned)} == {6.4}
    assert shapes["products_smaller"] == pytest.approx(6.4, rel=0.02)
    for row in tuned:
        assert 2 < row["model_smaller"] < row["products_smaller"] < 6.4
        assert row["factors"] == [] or np.mean(row["factors"]) == pytest.approx(1, abs=0.01)
    scores = {row["what"]: row["divergence"] for row in tuned}
    apart = ("all terms", "no hard label", "no soft logits", "no features", "hard label alone")
    assert len({scores[terms] for terms in apart}) == len(apart)


def test_a_weight_that_is_not_2_4_is_not_counted_as_if_it_were(monkeypatch):
    bench = tool(monkeypatch, "benchmarks.gpusq")
    weight = torch.zeros(2, 16, dtype=torch.int8)
    weight[:, ::2] = 3
    assert bench.packed_bytes(weight) == 2 * 8 + 2 * 2
    weight[0, 1] = 1
    with pytest.raises(CompressError, match="a group of 4 holds 3"):
        bench.packed_bytes(weight)
