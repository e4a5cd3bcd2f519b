import numpy as np
import pytest
import torch

from compress.errors import CompressError
from compress.export.backends import parity


class Says:
    """A runner with prepared answers, one after the other."""

    def __init__(self, *answers, name="logits"):
        self.answers, self.name = list(answers), name

    def infer(self, inputs):
        return {self.name: self.answers.pop(0)}


def answers(seed=0, shape=(2, 5, 3)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compare(expected, found, inputs=None):
    return parity.parity(Says(expected), Says(found), [inputs or {}])


def example(batch, tokens):
    ids = torch.arange(batch * tokens).reshape(batch, tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_examples_have_three_shapes_and_padding_on_the_right():
    one, short, padded = parity.padded_examples(example, 6)
    assert [made["input_ids"].shape for made in (one, short, padded)] == [(1, 6), (3, 3), (3, 6)]
    assert one["attention_mask"].all()
    assert short["attention_mask"].all()
    assert padded["attention_mask"].sum(1).tolist() == [6, 4, 2]
    assert (np.diff(padded["attention_mask"], axis=1) <= 0).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_no_example_is_padding_alone_and_the_task_keeps_its_tensors(tokens):
    ids = torch.ones(3, 8, dtype=torch.long)

    def shared(batch, length):
        return {"input_ids": ids[:batch, :length], "attention_mask": ids[:batch, :length]}

    for made in parity.padded_examples(shared, tokens):
        assert made["attention_mask"].sum(1).min() >= 1
    assert ids.all()


def test_inputs_without_a_mask_are_passed_on():
    made = parity.padded_examples(lambda batch, tokens: {"pixel_values": torch.ones(batch, 3, 4, 4)}, 5)
    assert [inputs["pixel_values"].shape[0] for inputs in made] == [1, 3, 3]


def test_agreement_counts_items_and_the_share_of_equal_answers():
    first, second = np.array([[1.0, 2.0], [3.0, 1.0]]), np.array([[5.0, 4.0]])
    close = first + np.array([[2e-4, -3e-4], [0.0, 0.0]])
    found = parity.parity(Says(first, second), Says(close, second), [{}, {}])
    assert found.inputs == 3
    assert found.max_abs_difference == pytest.approx(3e-4)
    assert found.tolerance == pytest.approx(parity.TOLERANCE * 5.0)
    assert found.agreement == 1.0
    flipped = np.array([[1.0, 1.0001], [2.0, 1.0]])
    assert compare(flipped, flipped - [[0.0, 1.5e-4], [0.0, 0.0]]).agreement == 0.5


def test_the_tolerance_never_falls_below_that_of_answers_near_one():
    small = np.full((2, 3), 1e-3)
    assert compare(small, small).tolerance == parity.TOLERANCE


def test_a_disagreement_names_the_place_and_both_values():
    expected = answers()
    found = expected.copy()
    found[1, 4, 2] = expected[1, 4, 2] + 0.5
    place = rf"0\.5 at \[1, 4, 2\] of 'logits' \({expected[1, 4, 2]:.6g} in torch, {found[1, 4, 2]:.6g} in"
    with pytest.raises(CompressError, match=place.replace("-", r"\-").replace("+", r"\+")):
        compare(expected, found)


def test_the_worst_place_of_all_batches_is_the_one_that_is_named():
    zero = np.zeros((2, 2))
    bad, worse = np.array([[0.0, 0.1], [0.0, 0.0]]), np.array([[0.0, 0.0], [0.3, 0.0]])
    with pytest.raises(CompressError, match=r"0\.3 at \[1, 0\]"):
        parity.parity(Says(zero, zero, zero), Says(bad, worse, bad), [{}, {}, {}])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_answers_that_are_not_finite_never_agree(wrong, everywhere):
    expected = answers()
    found = np.full_like(expected, wrong) if everywhere else expected.copy()
    found[1, 2, 0] = wrong
    with pytest.raises(CompressError, match="disagree: inf at"):
        compare(expected, found)
    with pytest.raises(CompressError, match="disagree: inf at"):
        parity.parity(Says(expected, expected), Says(found, expected), [{}, {}])
    with pytest.raises(CompressError, match="disagree: inf at"):
        compare(found, found)


def test_padding_does_not_count_and_everything_else_does():
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = answers()
    found = expected.copy()
    found[1, 3:] = np.nan
    agreed = compare(expected, found, {"attention_mask": mask})
    assert (agreed.max_abs_difference, agreed.agreement) == (0.0, 1.0)
    loud = expected.copy()
    loud[1, 4] = 1e6  # would widen the tolerance
    found = loud.copy()
    found[0, 0, 0] += 0.01
    with pytest.raises(CompressError, match=r"at \[0, 0, 0\]"):
        compare(loud, found, {"attention_mask": mask})
    with pytest.raises(CompressError, match="disagree"):
        compare(expected[:, 0], expected[:, 0] + 0.01, {"attention_mask": mask})


def test_a_lower_precision_may_be_further_off_if_that_is_said():
    expected = answers()
    found = expected + np.float32(0.01)
    with pytest.raises(CompressError, match="disagree"):
        compare(expected, found)
    relaxed = parity.parity(Says(expected), Says(found), [{}], relative=0.02)
    assert relaxed.tolerance == pytest.approx(0.02 * max(1.0, float(np.abs(expected).max())))
    with pytest.raises(CompressError, match="disagree"):
        parity.parity(Says(expected), Says(found + 1), [{}], relative=0.02)


def test_one_number_an_item_is_compared_as_well():
    expected = answers(shape=(4,))
    assert compare(expected, expected).inputs == 4
    with pytest.raises(CompressError, match=r"at \[2, 0\]"):
        compare(expected, expected + np.array([0, 0, 0.1, 0], dtype=np.float32))


def test_a_missing_output_and_another_shape_are_refused():
    expected = answers()
    with pytest.raises(CompressError, match=r"'logits' should have shape \(2, 5, 3\), .* gives \(2, 5, 2\)"):
        compare(expected, expected[..., :2])
    with pytest.raises(CompressError, match="but the file gives None"):
        parity.parity(Says(expected), Says(expected, name="other"), [{}])


def test_the_difference_allowed_grows_on_request():
    def near(**words):
        first = np.array([[1.0, 0.0]])
        return parity.parity(Says(first), Says(first + np.array([[0.02, 0.0]])), [{}], **words)

    with pytest.raises(CompressError, match="disagree"):
        near()
    assert near(relative=0.03).tolerance == 0.03
