import math

import numpy as np
import pytest
import torch
from support import tiny
from support.classifier import padded
from torch import nn

from compress.recipe import Recovery
from compress.sites import prune
from compress.sites.prune import Removal
from compress.tasks.loading import Batch, load_task
from compress.training import distillation
from compress.training.distillation import HiddenState, ModelOutputs, Teacher

ALONE = {"task": 0.0, "logits": 0.0, "hidden": 0.0, "ranking": 0.0}


def only(**weights):
    return Recovery(**(ALONE | weights))


def softmax(values):
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def said(task, model=None, batch=None, sites=()):
    model = task.model if model is None else model
    return distillation.run_model(task, model, batch, distillation.hidden_states(task.model, sites))


@pytest.fixture(scope="module")
def job():
    """A task, its sites, one batch with padding, and a student with half the units."""
    task, sites = padded()
    batch = next(task.batches("calibration", 16))
    removals = {site.name: Removal(torch.arange(site.units // 2)) for site in sites}
    return task, sites, batch, prune.shrink(task.model, sites, removals)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """A task on sentence embeddings with texts of different lengths."""
    folder = tmp_path_factory.mktemp("embeddings")
    lines = ["text"] + ["red cat sees one dog", "two birds", "bird likes blue", "nine"] * 6
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    return load_task(str(tiny.encoder(folder / "model")), str(folder / "data.csv"), task="feature-extraction")


@pytest.mark.parametrize("heat", [1.0, 2.5])
def test_the_logits_loss_is_the_divergence_of_softened_distributions(job, heat):
    task, _, batch, _ = job
    ours, theirs = random(16, 3), 3 * random(16, 3, seed=1)
    found = distillation.loss(
        task, batch, ModelOutputs(ours, ()), ModelOutputs(theirs, ()), only(logits=1.0, temperature=heat)
    )
    total = 0.0
    for row in range(16):
        p = softmax([value / heat for value in theirs[row].tolist()])
        q = softmax([value / heat for value in ours[row].tolist()])
        total += heat**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 16
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_the_hidden_loss_is_each_tokens_squared_distance_in_units_of_the_teachers_token():
    ours, theirs = [random(5, 4), random(5, 4, seed=2)], [random(5, 4, seed=3), 9 * random(5, 4, seed=4)]
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for token in range(5):
            away = sum((float(x) - float(y)) ** 2 for x, y in zip(a[token], b[token], strict=True))
            total += away / sum(float(y) ** 2 for y in b[token]) / 5 / 2
    assert distillation.hidden_loss(ours, theirs).item() == pytest.approx(total, rel=1e-5)


def test_the_margin_loss_is_the_mean_over_every_ordered_pair_of_documents():
    ours, theirs = random(3, 4), random(3, 4, seed=5)
    each = []
    for i in range(3):
        for j in range(4):
            for k in range(4):
                if j != k:
                    each.append(float((ours[i, j] - ours[i, k]) - (theirs[i, j] - theirs[i, k])) ** 2)
    assert distillation.margin_loss(ours, theirs).item() == pytest.approx(np.mean(each), rel=1e-5)
    shifted = theirs + random(3, 1, seed=6)
    assert distillation.margin_loss(ours, shifted).item() == pytest.approx(np.mean(each), rel=1e-5)
    assert distillation.margin_loss(shifted, theirs).item() == pytest.approx(0, abs=1e-12)
    assert distillation.margin_loss(ours[:, :1], theirs[:, :1]).item() == 0


def test_embeddings_keep_directions_and_margins(embeddings):
    batch = next(embeddings.batches("calibration", 6))
    shape = (*batch.inputs["input_ids"].shape, 16)
    ours, theirs = random(*shape), random(*shape, seed=7)
    means = []
    for hidden in (ours.numpy(), theirs.numpy()):
        real = batch.real.numpy()
        rows = [hidden[i][real[i]].mean(0) for i in range(len(hidden))]
        means.append(np.array([row / np.linalg.norm(row) for row in rows]))
    away = np.mean([1 - a @ b for a, b in zip(*means, strict=True)])
    pair = ModelOutputs(ours, ()), ModelOutputs(theirs, ())
    found = distillation.loss(embeddings, batch, *pair, only(logits=1.0, temperature=4.0))
    assert found.item() == pytest.approx(away, rel=1e-5)
    scores = [torch.from_numpy(mean @ mean.T) for mean in means]
    margins = distillation.loss(embeddings, batch, *pair, only(ranking=1.0))
    assert margins.item() == pytest.approx(distillation.margin_loss(*scores).item(), rel=1e-5)
    assert margins.item() > 0


def test_a_teacher_has_nothing_to_teach_itself(job):
    task, sites, batch, _ = job
    model = prune.mask(task.model, sites, {})
    goal = said(task, None, batch, sites)
    found = distillation.loss(
        task, batch, said(task, model, batch, sites), goal, only(logits=1.0, hidden=1.0)
    )
    assert found.item() == 0
    found.backward()
    worst = max(float(value.grad.abs().max()) for value in model.parameters() if value.grad is not None)
    assert worst < 1e-6


def test_a_smaller_student_has_something_to_learn_from_every_loss(job):
    task, sites, batch, student = job
    goal, answer = said(task, None, batch, sites), said(task, student, batch, sites)
    for name in ("task", "logits", "hidden"):
        assert distillation.loss(task, batch, answer, goal, only(**{name: 1.0})).item() > 1e-3
    whole = only(task=0.2, logits=2.0, hidden=3.0)
    parts = [only(task=0.2), only(logits=2.0), only(hidden=3.0)]
    total = sum(distillation.loss(task, batch, answer, goal, part).item() for part in parts)
    assert distillation.loss(task, batch, answer, goal, whole).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", ["task", "logits", "hidden", "features"])
def test_every_loss_pulls_on_the_student_by_its_exact_slope_and_not_on_the_teacher(job, name):
    """A student whose answers were detached would learn nothing: its slope is checked against differences."""
    task, sites, batch, student = job
    goal = said(task, None, batch, sites)
    mine = said(task, student, batch, sites)
    wanted = only(**{name: 1.0})
    leaves = [value.detach().double().requires_grad_() for value in (mine.logits, *mine.hidden)]
    teacher = ModelOutputs(goal.logits.double(), tuple(value.double() for value in goal.hidden))

    def found(*values):
        return distillation.loss(task, batch, ModelOutputs(values[0], values[1:]), teacher, wanted)

    assert torch.autograd.gradcheck(found, leaves, fast_mode=True)
    pulled = torch.autograd.grad(found(*leaves), leaves, allow_unused=True)
    reached = [value is not None and bool(value.any()) for value in pulled]
    late = len(leaves) - math.ceil((len(leaves) - 1) / 3)
    assert reached == {
        "hidden": [False] + [True] * (len(leaves) - 1),
        "features": [place >= late for place in range(len(leaves))],
    }.get(name, [True] + [False] * (len(leaves) - 1))


def test_the_slope_of_margins_is_exact_and_moves_no_query_as_a_whole():
    ours, theirs = random(3, 4).double().requires_grad_(), random(3, 4, seed=5).double()
    assert torch.autograd.gradcheck(lambda scores: distillation.margin_loss(scores, theirs), (ours,))
    (slope,) = torch.autograd.grad(distillation.margin_loss(ours, theirs), ours)
    assert slope.sum(1).abs().max() < 1e-12
    assert slope.abs().max() > 1e-2


def test_without_any_weight_nothing_is_lost_and_nothing_moves(job):
    task, sites, batch, student = job
    goal, answer = said(task, None, batch, sites), said(task, student, batch, sites)
    found = distillation.loss(task, batch, answer, goal, only())
    assert found.item() == 0
    found.backward()
    assert all(value.grad is None or not bool(value.grad.any()) for value in student.parameters())
    student.zero_grad(set_to_none=True)


def test_padding_never_enters(job):
    task, sites, batch, student = job
    real = batch.real
    assert not bool(real.all())
    junk = batch.inputs["input_ids"] + 5 * (~real)
    other = Batch({**batch.inputs, "input_ids": junk}, batch.labels, real)
    wider = {name: nn.functional.pad(value, (0, 4)) for name, value in batch.inputs.items()}
    padded_more = Batch(wider, batch.labels, nn.functional.pad(real, (0, 4)))
    wanted = only(task=1.0, logits=1.0, hidden=1.0)
    found = []
    for one in (batch, other, padded_more):
        goal, answer = said(task, None, one, sites), said(task, student, one, sites)
        assert all(len(hidden) == int(real.sum()) for hidden in answer.hidden)
        found.append(distillation.loss(task, one, answer, goal, wanted).item())
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-5)


def test_without_labels_the_task_loss_is_left_out(job):
    task, sites, batch, student = job
    bare = Batch(batch.inputs, None, batch.real)
    goal, answer = said(task, None, bare, sites), said(task, student, bare, sites)
    found = distillation.loss(task, bare, answer, goal, only(task=1.0, logits=1.0))
    assert found.item() == distillation.loss(task, bare, answer, goal, only(logits=1.0)).item()


def test_a_layer_is_read_once_where_its_list_ends_also_when_its_sites_are_dropped(job):
    task, sites, batch, _ = job
    at = distillation.hidden_states(task.model, sites)
    assert at == tuple(HiddenState(f"bert.encoder.layer.{k}") for k in range(len(at)))
    assert 1 < len(at) < len(sites)
    gone = {site.name: Removal(torch.arange(0)) for site in sites[:2]}
    student = prune.shrink(task.model, sites, gone)
    hidden = distillation.run_model(task, student, batch, at).hidden
    assert [tuple(value.shape) for value in hidden] == [
        tuple(v.shape) for v in said(task, None, batch, sites).hidden
    ]


def test_a_cached_answer_is_the_computed_one_and_the_cache_keeps_its_bound(job, tmp_path):
    task, sites, _, _ = job
    at = distillation.hidden_states(task.model, sites)
    batches = list(task.batches("calibration", 8))
    fresh = [distillation.run_model(task, task.model, batch, at) for batch in batches]
    one = sum(v.numel() * 4 for v in (fresh[0].logits, *fresh[0].hidden)) + 4096
    for room, least in ((2.5 * one / 1e6, 1), (0, 0), (100, len(batches))):
        folder = tmp_path / f"{room:.3f}"
        folder.mkdir()
        teacher = Teacher(task, task.model, at, folder, room)
        for _ in range(2):
            for number, (batch, known) in enumerate(zip(batches, fresh, strict=True)):
                found = teacher(number, batch)
                assert torch.equal(found.logits, known.logits)
                assert all(torch.equal(a, b) for a, b in zip(found.hidden, known.hidden, strict=True))
                assert not found.logits.requires_grad
        files = list(folder.iterdir())
        assert sum(file.stat().st_size for file in files) <= room * 1e6
        assert teacher.used_mb == sum(file.stat().st_size for file in files) / 1e6
        assert least <= len(files) < (len(batches) if room < 100 else len(batches) + 1)
        again = Teacher(task, None, at, folder, room)  # no model: it can only read
        if room == 100:
            assert torch.equal(again(3, batches[3]).logits, fresh[3].logits)


def test_a_damaged_answer_is_computed_and_written_again(job, tmp_path):
    task, sites, batch, _ = job
    teacher = Teacher(task, task.model, distillation.hidden_states(task.model, sites), tmp_path, 10)
    first = teacher(0, batch)
    path = tmp_path / "000000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert torch.equal(teacher(0, batch).logits, first.logits)
    assert path.read_bytes() == whole


def by_hand(student, teacher, real, late, gated):
    """The features' loss of every late layer: loops over inputs and tokens; padding never enters."""
    found = []
    for ours, theirs in list(zip(student.hidden, teacher.hidden, strict=True))[-late:]:
        total, row = 0.0, 0
        for text in range(len(real)):
            choices = [
                max(range(3), key=said[text].tolist().__getitem__) for said in logits(student, teacher)
            ]
            for token in range(real.shape[1]):
                if not bool(real[text, token]):
                    continue
                away = sum((float(a) - float(b)) ** 2 for a, b in zip(ours[row], theirs[row], strict=True))
                if choices[0] == choices[1] or not gated:
                    total += away / sum(float(b) ** 2 for b in theirs[row])
                row += 1
        found.append(total / row)
    return found


def logits(*answers):
    return [answer.logits for answer in answers]


REAL = torch.tensor([[True, True, True, False], [True, True, False, False], [True, True, True, True]])


def apart(seed=0):
    """Answers of a student and a teacher to three padded texts, in four layers; they agree on two."""
    rows = int(REAL.sum())
    student = ModelOutputs(
        random(3, 3, seed=seed), tuple(random(rows, 5, seed=seed + k) for k in range(1, 5))
    )
    said = student.logits + 0.0
    said[1] = said[1].roll(1)
    teacher = ModelOutputs(said * 2, tuple(3 * random(rows, 5, seed=seed + k) for k in range(5, 9)))
    return student, teacher, Batch({}, None, REAL)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("share", "late"), [(0.01, 1), (1 / 3, 2), (0.5, 2), (1.0, 4)])
def test_features_are_those_of_late_layers_where_both_agree(job, share, late, gated):
    student, teacher, batch = apart()
    wanted = only(features=5.0, late=share, gated=gated)
    expected = by_hand(student, teacher, REAL, late, gated)
    found = distillation.feature_losses(job[0], batch, student, teacher, wanted)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    plain = distillation.loss(job[0], batch, student, teacher, wanted)
    assert plain.item() == pytest.approx(5 * sum(expected), rel=1e-5)
    factors = [0.5 + k for k in range(late)]
    weighed = distillation.loss(job[0], batch, student, teacher, wanted, factors=factors)
    total = sum(factor * each for factor, each in zip(factors, expected, strict=True))
    assert weighed.item() == pytest.approx(5 * total, rel=1e-5)


def test_what_student_and_teacher_see_differently_pulls_on_no_feature(job):
    """The control: the same hidden states under other answers give another loss, down to none."""
    student, teacher, batch = apart()
    wanted = only(features=1.0, late=1.0)
    states = [value.requires_grad_() for value in student.hidden]
    told = distillation.loss(job[0], batch, ModelOutputs(student.logits, tuple(states)), teacher, wanted)
    told.backward()
    text = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])  # of each row
    for value in states:
        assert value.grad[text == 1].abs().max() == 0
        assert value.grad[text != 1].abs().min(1).values.max() > 0
    wrong = ModelOutputs(-teacher.logits, student.hidden)
    assert distillation.loss(job[0], batch, wrong, teacher, wanted).item() == 0
    right = ModelOutputs(teacher.logits, student.hidden)
    ungated = only(features=1.0, late=1.0, gated=False)
    whole = distillation.loss(job[0], batch, right, teacher, wanted).item()
    assert whole > told.item() > 0
    assert whole == distillation.loss(job[0], batch, wrong, teacher, ungated).item()


def test_pictures_and_tokens_agree_each_in_its_own_way(embeddings):
    picture = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    assert distillation.agreement_mask(*picture, Batch({}), 6).tolist() == [True] * 3 + [False] * 3
    token = torch.eye(3)[None, [0, 1, 2, 0]].repeat(3, 1, 1), torch.eye(3)[None, [0, 1, 1, 1]].repeat(3, 1, 1)
    real = distillation.agreement_mask(*token, Batch({}, None, REAL), int(REAL.sum()))
    assert real.tolist() == [True, True, False, True, True, True, True, False, False]
    assert distillation.agreement_mask(*token, Batch({}), 12).tolist() == [True, True, False, False] * 3
    batch = next(embeddings.batches("calibration", 3))
    hidden = (random(int(batch.real.sum()), 4),), (random(int(batch.real.sum()), 4, seed=1),)
    ours, theirs = (ModelOutputs(random(*batch.real.shape, 8, seed=k), hidden[k]) for k in range(2))
    found = distillation.feature_losses(embeddings, batch, ours, theirs, only(features=1.0))
    assert found.item() == pytest.approx(
        distillation.hidden_loss(ours.hidden, theirs.hidden).item(), rel=1e-6
    )


def test_a_layer_that_stayed_far_counts_less():
    losses = [0.4, 0.1, 0.2, 0.3]
    mean = (1 / 0.4 + 1 / 0.1 + 1 / 0.2 + 1 / 0.3) / 4
    assert distillation.layer_factors(losses) == pytest.approx([1 / loss / mean for loss in losses])
    assert np.mean(distillation.layer_factors(losses)) == pytest.approx(1)
    assert np.argsort(distillation.layer_factors(losses)).tolist() == np.argsort(losses)[::-1].tolist()
    assert distillation.layer_factors([0.0] * 3) == (1.0,) * 3
    assert distillation.layer_factors([1e-3, *[1.0] * 9]) == (4.0, *[0.25] * 9)


def test_a_teacher_has_no_features_to_teach_itself(job):
    task, sites, batch, student = job
    goal = said(task, None, batch, sites)
    assert distillation.feature_losses(task, batch, goal, goal, only(features=1.0)).tolist() == [0.0]
    ours = said(task, student, batch, sites)
    assert distillation.loss(task, batch, ours, goal, only(features=1.0)).item() > 0
