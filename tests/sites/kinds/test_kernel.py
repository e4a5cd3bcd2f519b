"""Bytes that one operator of the roofline moves."""

from compress.sites.kinds.kernel import Kernel, product


def test_a_product_reads_both_operands_and_writes_its_result():
    # 2 products of [3, 5] by [5, 7]: 15 + 35 values read, 21 written, each of 4 bytes.
    assert product(2, 3, 7, 5, 4.0) == Kernel(2 * (15 + 35 + 21) * 4.0, 2, 3, 7, 5)


def test_operands_in_a_lower_precision_are_read_at_their_own_size():
    low = product(1, 3, 7, 5, 4.0, read_bytes=1.0, precision="int8")
    assert low == Kernel((15 + 35) * 1.0 + 21 * 4.0, 1, 3, 7, 5, "int8")
