import pytest
import torch

from compress.core.units import cut, index_of, remaining
from compress.errors import CompressError
from compress.ir import Slice


def part(width=2, start=0, dim=0):
    return Slice(tensor="w", dim=dim, width=width, start=start)


def test_indices_follow_the_order_of_the_kept_units():
    assert index_of(part(start=1), torch.tensor([2, 0])).tolist() == [5, 6, 1, 2]
    assert index_of(part(), torch.tensor([], dtype=torch.int64)).tolist() == []


def test_what_no_unit_owns_stays_in_its_place():
    parts = [part(width=1, start=7), part(width=2, start=1)]  # any order
    assert remaining(parts, torch.tensor([0, 2]), units=3, length=11).tolist() == [
        0,
        1,
        2,
        5,
        6,
        7,
        9,
        10,
    ]


def test_cutting_keeps_exactly_what_a_loop_keeps():
    tensor = torch.arange(60).reshape(5, 12)
    parts, kept = [part(start=0, dim=1), part(start=6, dim=1)], [1, 2]
    columns = [c for c in range(12) if c % 6 // 2 in kept]
    got = cut(tensor, parts, torch.tensor(kept), units=3)
    assert torch.equal(got, torch.stack([tensor[:, c] for c in columns], 1))
    assert got.is_contiguous()


def test_a_tensor_may_be_cut_along_two_dimensions():
    tensor = torch.arange(16).reshape(4, 4)
    got = cut(tensor, [part(dim=0), part(width=1, start=1, dim=1)], torch.tensor([1]), units=2)
    assert got.tolist() == [[8, 10, 11], [12, 14, 15]]


def test_a_tensor_without_slices_is_copied():
    tensor = torch.ones(2)
    got = cut(tensor, [], torch.tensor([0]), units=1)
    got += 1
    assert tensor.tolist() == [1, 1]


@pytest.mark.parametrize("parts", [[part(), part(start=3)], [part(start=1)]])
def test_slices_that_overlap_or_leave_the_tensor_are_refused(parts):
    with pytest.raises(CompressError, match=r"w: units own .* of dimension 0, which holds 4"):
        remaining(parts, torch.tensor([0]), units=2, length=4)


@pytest.mark.parametrize("kept", [[2], [-1, 0]])
def test_units_that_do_not_exist_are_refused(kept):
    with pytest.raises(CompressError, match="only 2"):
        remaining([part()], torch.tensor(kept), units=2, length=4)
