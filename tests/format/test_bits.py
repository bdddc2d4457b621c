import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from optimum_sab.format.bits import pack_bits, unpack_bits

bounded = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def random_signs(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 100), st.sampled_from([1, 4]))
def test_pack_bits_puts_every_column_in_its_bit(seed, rows, columns, multiple):
    signs = random_signs((rows, columns), seed)
    packed = pack_bits(signs, multiple)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // (8 * multiple)) * multiple)
    for i in range(rows):
        number = int.from_bytes(bytes(packed[i].tolist()), "little")
        assert number == sum(1 << j for j in range(columns) if signs[i, j])  # so padding bits are 0


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(0, 70), st.sampled_from([1, 4]))
def test_unpack_bits_is_the_inverse_of_pack_bits(seed, columns, multiple):
    signs = random_signs((2, 3, columns), seed)
    found = unpack_bits(pack_bits(signs, multiple), columns)
    assert found.dtype == torch.bool
    assert torch.equal(found, signs)


def test_pack_bits_of_a_worked_row():
    row = torch.tensor([True, False, False, True, False, False, False, True, True])
    assert pack_bits(row).tolist() == [0b10001001, 0b00000001]
    assert pack_bits(row, 4).tolist() == [0b10001001, 0b00000001, 0, 0]


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_unpack_bits_reads_the_lowest_bit_first(value):
    found = unpack_bits(torch.tensor([value], dtype=torch.uint8), 8)
    assert found.tolist() == [bool(value >> i & 1) for i in range(8)]


def test_pack_bits_accepts_a_view_that_is_not_contiguous():
    signs = random_signs((9, 20)).T
    assert torch.equal(unpack_bits(pack_bits(signs), 9), signs)
