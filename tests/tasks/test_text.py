import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from support import oracles, tiny

from compress.errors import CompressError
from compress.tasks.loading import load_task
from compress.tasks.task import Batch

GENERATOR = np.random.default_rng(0)
TEXTS = [  # all different: the last two words count
    " ".join([*GENERATOR.choice(tiny.WORDS, length), tiny.WORDS[at % 17], tiny.WORDS[at // 17]])
    for at, length in enumerate(GENERATOR.integers(0, 8, 40))
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One directory per kind of model, saved once."""
    place = tmp_path_factory.mktemp("models")
    return {
        "classifier": str(tiny.classifier(place / "classifier")),
        "encoder": str(tiny.encoder(place / "encoder")),
        "decoder": str(tiny.decoder(place / "decoder")),
    }


@pytest.fixture
def labelled(models, tmp_path):
    lines = "".join(f"{text},{('off', 'on')[at % 2]}\n" for at, text in enumerate(TEXTS))
    (tmp_path / "a.csv").write_text("text,label\n" + lines)
    return load_task(models["classifier"], str(tmp_path / "a.csv"))


@pytest.fixture
def pairs(tmp_path):
    def write(column, values):
        rows = [
            {"sentence1": TEXTS[at], "sentence2": TEXTS[-1 - at], column: value}
            for at, value in enumerate(values)
        ]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / "pairs.jsonl")

    return write


def run_of(task, model=None):
    """The dense model as the callable that a score asks."""

    def run(inputs):
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.inference_mode():
            return task.logits((model or task.model)(**tensors)).numpy()

    return run


def padded(batch, extra, pad=0):
    """The same batch with more padding on the right."""
    inputs = {name: F.pad(tensor, (0, extra)) for name, tensor in batch.inputs.items()}
    inputs["input_ids"][:, -extra:] = pad
    labels = batch.labels
    if labels is not None and labels.ndim == 2:
        labels = F.pad(labels, (0, extra), value=-100)
    return Batch(inputs, labels, F.pad(batch.real, (0, extra)))


def damaged(model):
    found = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(1.2)
    return found


def test_a_classifier_sees_every_text_once_with_its_label(labelled):
    task = labelled
    assert (task.name, task.metric, task.higher_is_better) == ("text-classification", "accuracy", True)
    assert dict(task.id2label) == {0: "off", 1: "on"}
    ids = {tuple(task.tokenizer(text)["input_ids"]): at % 2 for at, text in enumerate(TEXTS)}
    seen = []
    for split, count in task.samples.items():
        rows = 0
        for batch in task.batches(split, 5):
            real = batch.inputs["attention_mask"].bool()
            assert torch.equal(real, batch.real)
            assert set(batch.inputs) == {"input_ids", "attention_mask"}
            assert real.any(0).all()
            for words, here, label in zip(batch.inputs["input_ids"], real, batch.labels, strict=True):
                assert (words[~here] == 0).all()
                assert ids[tuple(words[here].tolist())] == label
                seen.append(tuple(words[here].tolist()))
            rows += len(real)
        assert rows == count
    assert set(seen) == set(ids)
    assert task.samples == {"calibration": 28, "validation": 4, "test": 8}


def test_batches_are_the_same_every_time_and_limits_take_the_first(labelled):
    first, again = (list(labelled.batches("calibration", 4)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.equal(one.labels, other.labels)
    few = list(labelled.batches("calibration", 4, 6))
    assert [len(batch.labels) for batch in few] == [4, 2]
    lengths = torch.cat([batch.real.sum(1) for batch in few])
    assert torch.equal(lengths, lengths.sort().values)
    words = {tuple(row[row != 0].tolist()) for batch in few for row in batch.inputs["input_ids"]}
    rows = labelled.rows["calibration"][:6]
    assert words == {tuple(labelled.tokenizer(text)["input_ids"]) for (text,) in rows}


def test_long_texts_are_cut_to_what_is_asked_and_what_the_model_takes(models, tmp_path):
    rows = [{"text": " ".join(["red"] * 60), "label": at % 2} for at in range(10)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for tokens, length in ((None, 24), (99, 24), (7, 7)):
        task = load_task(models["classifier"], str(tmp_path / "a.json"), tokens=tokens)
        batch = next(task.batches("test", 8))
        assert batch.inputs["input_ids"].shape[1] == length
        assert batch.inputs["input_ids"][0, -1] == 3


def test_accuracy_loss_and_divergence_agree_with_loops(labelled):
    right = total = 0
    for batch in labelled.batches("test", 3):
        logits = labelled.model(**batch.inputs).logits.detach()
        for scores, label in zip(logits.tolist(), batch.labels.tolist(), strict=True):
            right += scores.index(max(scores)) == label
            total += 1
        other = damaged(labelled.model)(**batch.inputs).logits.detach()
        loss, kl = 0.0, 0.0
        for dense, changed, label in zip(logits, other, batch.labels, strict=True):
            p, q = oracles.softmax(dense.tolist()), oracles.softmax(changed.tolist())
            loss -= math.log(q[label]) / len(logits)
            kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(logits)
        assert labelled.loss(other, batch).item() == pytest.approx(loss, rel=1e-5)
        assert labelled.divergence(other, logits, batch).item() == pytest.approx(kl, rel=1e-3)
        assert labelled.divergence(logits, logits, batch).item() == pytest.approx(0, abs=1e-7)
    assert labelled.score(run_of(labelled)) == pytest.approx(right / total)
    assert labelled.score(lambda x: -run_of(labelled)(x)) == pytest.approx(1 - right / total)


def test_pairs_are_told_apart_by_their_segments(models, pairs):
    task = load_task(models["classifier"], pairs("label", [at % 2 for at in range(20)]))
    batch = next(task.batches("test", 4))
    for words, kinds in zip(batch.inputs["input_ids"], batch.inputs["token_type_ids"], strict=True):
        first_end = words.tolist().index(3)
        assert kinds[: first_end + 1].sum() == 0
        assert kinds.sum() == (words != 0).sum() - first_end - 1
    example = task.example(2, 10)
    assert example["token_type_ids"].tolist() == [[0] * 5 + [1] * 5] * 2
    assert set(example) == set(batch.inputs)
    assert task.model(**example).logits.shape == (2, 2)


def test_padding_changes_no_loss_no_divergence_and_no_embedding(models, labelled, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    (tmp_path / "b.txt").write_text("\n".join(TEXTS * 4))
    tasks = [
        labelled,
        load_task(models["encoder"], str(tmp_path / "a.txt")),
        load_task(models["decoder"], str(tmp_path / "b.txt"), tokens=12),
    ]
    for task in tasks:
        other = damaged(task.model)
        for batch in task.batches("test", 4):
            more = padded(batch, 5, pad=7)
            with torch.inference_mode():
                both = [
                    (task.logits(other(**b.inputs)), task.logits(task.model(**b.inputs)), b)
                    for b in (batch, more)
                ]
            plain, wide = (task.divergence(*answers).item() for answers in both)
            assert plain > 1e-5
            assert wide == pytest.approx(plain, rel=1e-3)
            if task.labelled:
                plain, wide = (task.loss(answers[0], answers[2]).item() for answers in both)
                assert wide == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("kind", ["classifier", "encoder", "decoder"])
def test_padding_changes_no_score(models, labelled, tmp_path, monkeypatch, kind):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS * 4))
    task = labelled
    if kind != "classifier":
        task = load_task(models[kind], str(tmp_path / "a.txt"), tokens=12)
    run = run_of(task, damaged(task.model))
    plain = task.score(run)
    name = "batches" if kind != "encoder" else "indexed"
    whole = getattr(task, name)

    def wider(split, size, limit=None):
        for item in whole(split, size, limit):
            yield padded(item, 3) if isinstance(item, Batch) else (item[0], padded(item[1], 3))

    monkeypatch.setattr(task, name, wider)
    assert task.score(run) == pytest.approx(plain, rel=1e-5)


def test_an_answer_that_is_no_number_is_refused(labelled):
    with pytest.raises(CompressError, match=r"answers NaN or infinity"):
        labelled.score(lambda inputs: np.full((len(inputs["input_ids"]), 2), np.nan))


def test_embeddings_are_compared_with_the_dense_model(models, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    task = load_task(models["encoder"], str(tmp_path / "a.txt"))
    assert (task.name, task.metric, task.labelled) == ("feature-extraction", "cosine", False)
    assert sum(task.samples.values()) == 40
    assert task.score(run_of(task)) == pytest.approx(1, abs=1e-6)
    other = damaged(task.model)
    expected = []
    for (text,) in task.rows["test"]:
        inputs = task.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            one, two = (m(**inputs).last_hidden_state[0].mean(0).tolist() for m in (task.model, other))
        expected.append(oracles.cosine(one, two))
    assert task.score(run_of(task, other)) == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert task.score(run_of(task, other)) < 0.9999
    assert task.score(run_of(task, other), limit=2) == pytest.approx(sum(expected[:2]) / 2, abs=1e-6)
    batch = next(task.batches("test", 3))
    with pytest.raises(CompressError, match=r"no labels, so no loss"):
        task.loss(torch.zeros(1), batch)


def test_the_divergence_of_embeddings_is_one_minus_their_cosine(models, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    task = load_task(models["encoder"], str(tmp_path / "a.txt"))
    hidden = torch.tensor([[[1.0, 0.0], [1.0, 2.0], [9.0, 9.0]]])
    dense = torch.tensor([[[3.0, 0.0], [0.0, 0.0], [5.0, 7.0]]])
    batch = Batch({}, real=torch.tensor([[True, True, False]]))
    assert task.divergence(hidden, dense, batch).item() == pytest.approx(1 - 1 / math.sqrt(2))
    whole = task.divergence(hidden, dense, Batch({})).item()
    assert whole == pytest.approx(1 - oracles.cosine([11, 11], [8, 7]), abs=1e-6)


def test_scored_pairs_give_the_rank_correlation(models, pairs):
    scores = [round(float(value), 1) for value in GENERATOR.uniform(0, 5, 40)]
    scores[3] = scores[4] = scores[5]
    path = pairs("score", scores)
    task = load_task(models["encoder"], path, test=path)
    assert (task.metric, task.samples["test"]) == ("spearman", 40)
    cosines = []
    for first, second in zip(task.rows["test"][0::2], task.rows["test"][1::2], strict=True):
        vectors = []
        for (text,) in (first, second):
            inputs = task.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            with torch.inference_mode():
                vectors.append(task.model(**inputs).last_hidden_state[0].mean(0).tolist())
        cosines.append(oracles.cosine(*vectors))
    assert task.score(run_of(task)) == pytest.approx(oracles.spearman(cosines, task.scores["test"]), abs=5e-3)
    few = oracles.spearman(cosines[:9], task.scores["test"][:9])
    assert task.score(run_of(task), limit=9) == pytest.approx(few, abs=1e-3)
    assert task.score(lambda x: np.ones((*x["input_ids"].shape, 16), np.float32)) == 0
    with pytest.raises(CompressError, match=r"line 2 has 'a' in column 'score', not a finite number"):
        load_task(models["encoder"], pairs("score", ["1", "a"] + ["2"] * 10))


def test_running_text_is_cut_into_blocks_without_padding(models, tmp_path):
    text = "\n".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    task = load_task(models["decoder"], str(tmp_path / "a.txt"), tokens=10)
    assert (task.name, task.metric, task.higher_is_better) == ("text-generation", "perplexity", False)
    ids = task.tokenizer("\n".join(TEXTS[32:]), add_special_tokens=False)["input_ids"]
    blocks = [ids[at : at + 10] for at in range(0, len(ids) - 9, 10)]
    batches = list(task.batches("test", 2))
    assert [row for batch in batches for row in batch.inputs["input_ids"].tolist()] == blocks
    assert task.samples["test"] == len(blocks)
    for batch in batches:
        assert batch.real.all()
        assert batch.inputs["attention_mask"].eq(1).all()
        assert torch.equal(batch.labels, batch.inputs["input_ids"])
    assert sum(len(batch.labels) for batch in task.batches("calibration", 2, 3)) == 3


@pytest.mark.parametrize("special", [True, False])
def test_documents_end_once_in_the_end_of_sequence(models, tmp_path, special):
    directory = shutil.copytree(models["decoder"], tmp_path / "m")
    tiny.save_tokenizer(directory, special=special)
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    task = load_task(str(directory), str(tmp_path / "a.json"), tokens=6)
    stream = []
    for text in TEXTS[32:]:
        words = [4 + tiny.WORDS.index(word) for word in text.split()]
        stream += [2, *words, 3] if special else [*words, 3]
    assert task.blocks["test"].flatten().tolist() == stream[: len(stream) // 6 * 6]


def test_perplexity_and_loss_agree_with_loops(models, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    task = load_task(models["decoder"], str(tmp_path / "a.txt"), tokens=8)
    total, count = 0.0, 0
    for batch in task.batches("test", 3):
        logits = task.model(**batch.inputs).logits.detach()
        here, before = 0.0, count
        for scores, words in zip(logits, batch.inputs["input_ids"].tolist(), strict=True):
            for at in range(1, len(words)):
                here -= math.log(oracles.softmax(scores[at - 1].tolist())[words[at]])
                count += 1
        total += here
        assert task.loss(logits, batch).item() == pytest.approx(here / (count - before), rel=1e-5)
    assert task.score(run_of(task)) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_large_vocabularies_are_scored_in_small_batches(models, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    task = load_task(models["decoder"], str(tmp_path / "a.txt"), tokens=8)
    monkeypatch.setattr("compress.tasks.text_generation.LOGITS_AT_ONCE", 8 * task.vocabulary * 2)
    sizes = []

    def run(inputs):
        sizes.append(len(inputs["input_ids"]))
        return run_of(task)(inputs)

    task.score(run)
    assert max(sizes) == 2


def test_calibration_reads_no_more_running_text_than_it_needs(models, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.tasks.text_generation.CALIBRATION_BLOCKS", 3)
    monkeypatch.setattr("compress.tasks.text_generation.CHUNK", 40)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    task = load_task(models["decoder"], str(tmp_path / "a.txt"), tokens=8)
    assert task.samples["calibration"] == 3
    assert task.samples["test"] > 3


def test_less_than_a_block_of_text_is_refused(models, tmp_path):
    (tmp_path / "a.txt").write_text("red\n" * 12)
    with pytest.raises(CompressError, match=r"a.txt has \d+ tokens in one split, less than one block of 10"):
        load_task(models["decoder"], str(tmp_path / "a.txt"), tokens=10)


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path):
    directory = tiny.classifier(tmp_path / "m", vocab_size=10)
    rows = [{"text": "cat", "label": at % 2} for at in range(10)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    task = load_task(str(directory), str(tmp_path / "a.json"))
    with pytest.raises(CompressError, match=r"gives token 16, but the model has 10 embeddings"):
        next(task.batches("test", 2))


def test_a_decoder_that_classifies_learns_which_token_is_padding(models, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=21, n_positions=24, n_embd=8, n_layer=1, n_head=2)
    directory = tiny.save(transformers.GPT2ForSequenceClassification(config), tmp_path / "m")
    rows = [{"text": text, "label": at % 2} for at, text in enumerate(TEXTS)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    task = load_task(str(directory), str(tmp_path / "a.json"))
    batch = next(task.batches("calibration", 8))
    together = task.model(**batch.inputs).logits
    for row in range(8):
        words = batch.inputs["input_ids"][row, batch.real[row]][None]
        alone = task.model(words, attention_mask=torch.ones_like(words)).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("names", "changes"), [(("one",), {}), (("a", "b"), {"problem_type": "regression"})])
def test_a_head_without_single_labels_is_refused(tmp_path, names, changes):
    directory = tiny.classifier(tmp_path / "m", names, **changes)
    (tmp_path / "a.csv").write_text("text,label\n" + "red,0\n" * 10)
    with pytest.raises(CompressError, match=r"only single-label classifiers are scored"):
        load_task(str(directory), str(tmp_path / "a.csv"))
