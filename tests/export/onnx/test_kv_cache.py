import numpy as np

from compress.export.onnx import kv_cache
from compress.export.onnx.kv_cache import IDS, MASK, PAST, POSITIONS

NAMES = dict.fromkeys((IDS, MASK, POSITIONS, f"{PAST}0.key", f"{PAST}0.value", f"{PAST}2.key"))
OUTPUTS = {
    "logits": ("batch", "tokens", 50),
    "present.0.key": ("batch", 3, "past + tokens", 5),
    "present.0.value": ("batch", 3, "past + tokens", 7),
    "present.2.key": ("batch", 1, None, 5),
}


def prompt():
    return {IDS: np.ones((2, 4), np.int64), MASK: np.array([[1, 1, 1, 1], [0, 0, 1, 1]])}


def test_widths_are_those_that_the_outputs_state():
    assert kv_cache.widths(NAMES, OUTPUTS) == {
        f"{PAST}0.key": (3, 5), f"{PAST}0.value": (3, 7), f"{PAST}2.key": (1, 5),
    }  # fmt: skip
    assert kv_cache.widths({IDS: None, MASK: None}, {"logits": ("batch", 2)}) == {}


def test_positions_count_real_tokens_and_the_last_ones_are_wanted():
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    assert kv_cache.positions(mask, 5).tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 0, 1, 1]]
    assert kv_cache.positions(mask, 2).tolist() == [[3, 4], [1, 2], [1, 1]]


def test_a_prompt_gets_an_empty_past_and_its_positions():
    found = kv_cache.complete(prompt(), NAMES, OUTPUTS)
    assert set(found) == set(NAMES)
    shapes = {name: value.shape for name, value in found.items() if name.startswith(PAST)}
    assert shapes == {
        f"{PAST}0.key": (2, 3, 0, 5), f"{PAST}0.value": (2, 3, 0, 7), f"{PAST}2.key": (2, 1, 0, 5),
    }  # fmt: skip
    assert all(found[name].dtype == np.float32 for name in shapes)
    assert found[POSITIONS].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


def test_what_is_given_stays_and_what_is_not_wanted_is_not_made():
    own = {**prompt(), POSITIONS: np.full((2, 4), 9), f"{PAST}0.key": np.ones((2, 3, 6, 5), np.float32)}
    found = kv_cache.complete(own, NAMES, OUTPUTS)
    assert found[POSITIONS] is own[POSITIONS]
    assert found[f"{PAST}0.key"] is own[f"{PAST}0.key"]
    assert set(kv_cache.complete(prompt(), {IDS: None, MASK: None}, {})) == {IDS, MASK}
    for less in (IDS, MASK):
        assert set(kv_cache.complete({less: prompt()[less]}, NAMES, OUTPUTS)) == {less}


def test_a_step_is_one_token_after_a_past_of_the_length_asked():
    found = kv_cache.step(np.array([[5], [6]]), 9, NAMES, OUTPUTS)
    assert found[IDS].tolist() == [[5], [6]]
    assert found[MASK].shape == (2, 10)
    assert found[MASK].all()
    assert found[POSITIONS].tolist() == [[9], [9]]
    assert found[f"{PAST}0.value"].shape == (2, 3, 9, 7)
    assert found[f"{PAST}2.key"].shape == (2, 1, 9, 5)
    assert found[f"{PAST}0.key"].std() > 0.5
