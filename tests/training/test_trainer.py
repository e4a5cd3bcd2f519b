import dataclasses
import functools
import itertools

import pytest
import torch
from support.classifier import padded
from support.lessons import judge, lesson, same, student, weights

from compress.errors import CompressError
from compress.recipe import Recovery
from compress.tasks.loading import Batch
from compress.tasks.sampler import shuffled
from compress.training import distillation, trainer
from compress.training.distillation_data import DistillationData
from compress.training.trainer import TrainingRun


class Killed(Exception):  # noqa: N818
    """What ends a run from outside."""


@functools.cache
def straight(folder, **changes):
    """Weights and scores of a run that nothing interrupts."""
    model = student()
    scores = trainer.train(TrainingRun(model, lesson(folder, **changes)), judge)
    return weights(model), scores


def test_the_student_comes_nearer_to_the_dense_model_on_every_seed(tmp_path):
    for seed in range(3):
        scores = straight(tmp_path / "c", seed=seed, epochs=6)[1]
        assert len(scores) == 7
        assert max(scores) > scores[0] / 2 > scores[0]


def test_it_can_learn_eight_inputs_by_heart(tmp_path):
    whole = lesson(tmp_path / "c", epochs=60, hidden=0.0, task=0.0)
    first = next(iter(whole.batches()))
    few = DistillationData(whole.task, whole.teacher, lambda: [first], 1, whole.wanted)
    model = student()
    goal = whole.teacher(0, first).logits

    def near(candidate):
        with torch.no_grad():
            return -whole.task.divergence(candidate(**first.inputs).logits, goal, first).item()

    scores = trainer.train(TrainingRun(model, few), near)
    assert -max(scores) < 0.02 * -scores[0]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_zeros_stay_exact_zeros_after_every_step(tmp_path, decay):
    model = student()
    names = [name for name, value in model.named_parameters() if name.endswith("dense.weight")]
    generator = torch.Generator().manual_seed(4)
    masks = {n: torch.rand(model.get_parameter(n).shape, generator=generator) < 0.6 for n in names}
    before = weights(model)
    run = TrainingRun(model, lesson(tmp_path / "c", decay=decay), zeros=masks)
    for number, batch in enumerate(run.lesson.batches()):
        run.advance(number, batch)
        for name, mask in masks.items():
            value = model.get_parameter(name)
            assert bool((value[mask] == 0).all())
            assert bool((value[~mask] != before[name][~mask]).any())
            assert bool((run.optimizer.state[value]["exp_avg"][mask] == 0).all())
    run.release()
    assert all(bool((model.get_parameter(name)[mask] == 0).all()) for name, mask in masks.items())


def test_a_mask_that_does_not_fit_is_refused(tmp_path):
    model = student()
    name = "classifier.weight"
    for wrong in (
        {name: torch.ones(2, 2, dtype=torch.bool)},
        {name: torch.ones(3, 16)},
        {"no": torch.ones(1)},
    ):
        with pytest.raises(CompressError, match="mask of"):
            TrainingRun(model, lesson(tmp_path / "c"), zeros=wrong)


def test_a_learning_rate_of_zero_moves_nothing(tmp_path):
    model = student()
    before = weights(model)
    scores = trainer.train(TrainingRun(model, lesson(tmp_path / "c", rate=0.0, decay=0.3)), judge)
    assert same(before, weights(model))
    assert len(set(scores)) == 1


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(tmp_path):
    first, scores = straight(tmp_path / "a", epochs=1)
    again, same_scores = straight(tmp_path / "b", epochs=1)
    other, _ = straight(tmp_path / "a", epochs=1, seed=9)
    assert same(first, again)
    assert scores == same_scores
    assert not same(first, other)


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 11, 12, 17])
def test_killed_and_resumed_equals_not_killed(tmp_path, steps):
    settings = {"mode": "full", "courses": 2}
    expected, scores = straight(tmp_path / "a", **settings)
    path = tmp_path / "run.safetensors"

    def die(done, total):
        if done == steps:
            raise Killed

    with pytest.raises(Killed):
        trainer.train(
            TrainingRun(student(), lesson(tmp_path / "b", **settings), checkpoint=path, made_from="x"),
            judge,
            die,
        )
    model = student()
    run = TrainingRun(model, lesson(tmp_path / "c", **settings), checkpoint=path, made_from="x")
    assert run.state.step == steps
    assert trainer.train(run, judge) == scores
    assert same(expected, weights(model))


def test_killed_while_it_is_judged_it_is_judged_again(tmp_path):
    expected, scores = straight(tmp_path / "a")
    path = tmp_path / "run.safetensors"
    calls = itertools.count()

    def dying(model):
        if next(calls) == 1:
            raise Killed
        return judge(model)

    with pytest.raises(Killed):
        trainer.train(TrainingRun(student(), lesson(tmp_path / "a"), checkpoint=path, made_from="x"), dying)
    model = student()
    assert (
        trainer.train(TrainingRun(model, lesson(tmp_path / "a"), checkpoint=path, made_from="x"), judge)
        == scores
    )
    assert same(expected, weights(model))


def test_a_finished_run_is_only_read(tmp_path):
    path = tmp_path / "run.safetensors"
    first = student()
    scores = trainer.train(TrainingRun(first, lesson(tmp_path / "a"), checkpoint=path, made_from="x"), judge)
    second = student()
    run = TrainingRun(second, lesson(tmp_path / "a"), checkpoint=path, made_from="x")
    assert run.finished
    assert trainer.train(run, lambda model: pytest.fail("judged again")) == scores
    assert same(weights(first), weights(second))


@pytest.mark.parametrize("damage", ["other", "cut", "nothing"])
def test_a_checkpoint_of_something_else_or_in_pieces_is_not_taken_up(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    trainer.train(TrainingRun(student(), lesson(tmp_path / "a"), checkpoint=path, made_from="x"), judge)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    run = TrainingRun(
        student(), lesson(tmp_path / "a"), checkpoint=path, made_from="x" if damage != "other" else "y"
    )
    assert run.state.step == (12 if damage == "nothing" else 0)


def test_the_best_weights_are_kept_and_the_untuned_ones_are_among_them(tmp_path):
    model = student()
    before = weights(model)
    worse = (3.0, 2.0, 1.0, 2.0, 2.5)
    marks = iter(worse)
    assert trainer.train(TrainingRun(model, lesson(tmp_path / "c")), lambda _: next(marks)) == worse
    assert same(before, weights(model))
    seen = []
    marks = iter([1.0, 3.0, 2.0])

    def mark(candidate):
        seen.append(weights(candidate))
        return next(marks)

    trainer.train(TrainingRun(model, lesson(tmp_path / "c")), mark)
    assert same(seen[1], weights(model))
    assert not same(seen[1], seen[2])


def test_full_goes_on_from_the_best_weights_until_a_course_raises_no_score(tmp_path):
    marks = iter([1.0, 2.0, 3.0, 5.0, 4.0, 4.5, 5.0])
    seen = []

    def mark(candidate):
        seen.append(weights(candidate))
        return next(marks)

    run = TrainingRun(student(), lesson(tmp_path / "c", mode="full", rate=1e-3, checkpoint_s=60))
    begun = []
    restart = run.restart
    run.restart = lambda: (restart(), begun.append(weights(run.model)))
    assert len(trainer.train(run, mark)) == 7
    assert [same(now, seen[best]) for now, best in zip(begun, [2, 3], strict=True)] == [True, True]
    few = TrainingRun(student(), lesson(tmp_path / "c", mode="full", courses=2))
    rising = itertools.count()
    assert len(trainer.train(few, lambda _: float(next(rising)))) == 5


@pytest.mark.parametrize(
    ("mode", "scores", "rates"),
    [
        ("fast", [3, 1, 2, 4, 3], [1, 0.2]),  # the calmer course helps
        ("fast", [3, 1, 2, 2, 1], [1, 0.2]),  # nor does that
        ("fast", [3, 1, 3], [1]),  # as good as before is not worse
        ("full", [3, 1, 2, 2, 1], [1, 0.2]),
        ("full", [3, 1, 2, 4, 3, 5, 4, 5, 5], [1, 0.2, 0.2, 0.2]),  # once calm, it stays so
        ("full", [3, 1, 2, 4, 3, 2, 2, 5, 4, 4, 4, 4, 3], [1, 0.2, 0.2, 0.04, 0.04, 0.008]),
        ("full", [3, 4, 3, 3, 2, 3, 2], [1, 1, 0.2]),
    ],
)
def test_a_course_that_harmed_is_followed_by_a_calmer_one(tmp_path, mode, scores, rates):
    run = TrainingRun(student(), lesson(tmp_path / "c", mode=mode, rate=1e-3, warmup=0.5))
    marks, used = iter(map(float, scores)), []
    count = run.lesson.wanted.epochs * run.lesson.count

    advance = run.advance

    def watched(number, batch):
        advance(number, batch)
        used.append(run.optimizer.param_groups[0]["lr"])

    run.advance = watched
    assert trainer.train(run, lambda _: next(marks)) == tuple(map(float, scores))
    assert len(used) == count * len(rates)
    first = used[:count]
    for number, rate in enumerate(rates):
        own = used[number * count : (number + 1) * count]
        assert own == pytest.approx([rate * value for value in first])


def test_a_judge_without_an_opinion_keeps_the_last_weights_of_one_course(tmp_path):
    model = student()
    before = weights(model)
    run = TrainingRun(model, lesson(tmp_path / "c", mode="full"))
    assert trainer.train(run, lambda _: 0.0) == (0.0,) * 3
    assert not same(before, weights(model))


def test_it_learns_without_labels(tmp_path):
    model = student()
    scores = trainer.train(TrainingRun(model, lesson(tmp_path / "c", labels=False, epochs=4)), judge)
    assert max(scores) > scores[0] / 2


def test_embedding_tables_and_flags_of_gradients_stay(tmp_path):
    model = student()
    model.classifier.bias.requires_grad_(False)
    before = weights(model)
    run = TrainingRun(model, lesson(tmp_path / "c", epochs=1))
    trainer.train(run, judge)
    after = weights(model)
    tables = [name for name in before if "embeddings.weight" in name]
    assert len(tables) == 3
    assert all(torch.equal(before[name], after[name]) for name in tables)
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["classifier.bias"]


def test_random_numbers_of_the_caller_are_left_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer.train(TrainingRun(student(), lesson(tmp_path / "c", epochs=1)), judge)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_do(tmp_path):
    model = student()
    model.classifier.bias.data.fill_(float("nan"))
    run = TrainingRun(model, lesson(tmp_path / "c"))
    with pytest.raises(CompressError, match=r"loss became nan at step 0; lower rate in \[recovery\]"):
        trainer.train(run, lambda _: 0.0)


def test_the_rate_rises_and_falls_along_lines():
    wanted = Recovery(rate=2.0, warmup=0.25)
    rates = [trainer.rate_at(step, 40, wanted) for step in range(40)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([2.0 * (30 - step) / 30 for step in range(30)])
    assert trainer.rate_at(0, 1, wanted) == 2.0


def test_every_batch_comes_once_in_an_order_that_the_seed_fixes():
    batches = [Batch({"x": torch.full((4,), k)}) for k in range(40)]
    for pool in (0, 100, 10**9):
        order = [number for number, _ in shuffled(batches, (0, 1), pool)]
        assert sorted(order) == list(range(40))
        assert order == [number for number, _ in shuffled(batches, (0, 1), pool)]
        assert (order == list(range(40))) == (pool == 0)
        assert all(int(batch.inputs["x"][0]) == number for number, batch in shuffled(batches, (0, 2), pool))
    assert order != [number for number, _ in shuffled(batches, (0, 2))]


def test_a_forecast_moves_nothing(tmp_path):
    model = student()
    before = weights(model)
    assert trainer.forecast_s(model, lesson(tmp_path / "c")) > 0
    assert same(before, weights(model))
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize(
    ("count", "few", "numbers"),
    [(12, 3, [2, 6, 10]), (13, 4, [1, 4, 7, 10]), (3, 8, [0, 1, 2]), (8, 8, range(8))],
)
def test_what_stands_for_all_batches_comes_from_everywhere(tmp_path, count, few, numbers):
    """Batches are sorted by length within a window: the first ones are the shortest."""
    whole = list(padded()[0].batches("calibration", 1))[:count]
    some = dataclasses.replace(lesson(tmp_path / "c"), batches=lambda: iter(whole), count=count)
    found = list(some.spread(few))
    assert [number for number, _ in found] == list(numbers)
    assert all(batch is whole[number] for number, batch in found)


def test_a_forecast_counts_long_batches(tmp_path, monkeypatch):
    seen = []
    some = lesson(tmp_path / "c")
    call = DistillationData.loss
    monkeypatch.setattr(
        DistillationData,
        "loss",
        lambda self, model, number, batch: seen.append(number) or call(self, model, number, batch),
    )
    trainer.forecast_s(student(), some)
    assert seen == [number for number, _ in some.spread(6)]
    assert max(seen) >= some.count / 2


GPUSQ = {"task": 1.0, "logits": 10.0, "hidden": 0.0, "features": 5.0, "late": 1.0}


def test_from_the_second_course_on_late_layers_count_by_how_near_the_first_brought_them(tmp_path):
    marks = itertools.count()
    run = TrainingRun(student(), lesson(tmp_path / "c", mode="full", courses=2, **GPUSQ))
    weighed = []
    loss = distillation.loss

    def watched(*words):
        weighed.append(words[-1])
        return loss(*words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "loss", watched)
        trainer.train(run, lambda _: float(next(marks)))
    steps = 2 * run.lesson.count
    assert weighed == [()] * steps + [run.state.factors] * steps
    first = TrainingRun(student(), lesson(tmp_path / "c", **GPUSQ))
    trainer.train(first, lambda _: float(next(marks)))
    assert run.state.factors == distillation.layer_factors(first.lesson.apart(first.model))
    assert len(set(run.state.factors)) == len(first.lesson.teacher.at) == 2
    assert first.state.factors == ()
    plain = TrainingRun(student(), lesson(tmp_path / "c", mode="full", courses=2))
    trainer.train(plain, lambda _: float(next(marks)))
    assert plain.state.factors == ()


@pytest.mark.parametrize("steps", [11, 12, 14])
def test_a_run_that_learns_features_resumes_with_its_factors(tmp_path, steps):
    settings = {"mode": "full", "courses": 2, **GPUSQ}
    path = tmp_path / "run.safetensors"
    model, marks = student(), itertools.count()
    trainer.train(TrainingRun(model, lesson(tmp_path / "a", **settings)), lambda _: float(next(marks)))

    def die(done, total):
        if done == steps:
            raise Killed

    marks = itertools.count()
    killed = TrainingRun(student(), lesson(tmp_path / "a", **settings), checkpoint=path, made_from="x")
    with pytest.raises(Killed):
        trainer.train(killed, lambda _: float(next(marks)), die)
    again = student()
    run = TrainingRun(again, lesson(tmp_path / "a", **settings), checkpoint=path, made_from="x")
    trainer.train(run, lambda _: float(next(marks)))
    assert same(weights(model), weights(again))
