"""The digest is what its docstring says, and changes with whatever changes."""

import hashlib

import pytest
import torch

from optimum_sab.format.digest import PAGE, SHORT, digest


def by_hand(tensor):
    """From the description, in plain Python."""
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    kind = f"{str(tensor.dtype)[6:]}[{','.join(str(size) for size in tensor.shape)}]".encode()
    if len(content) <= 65536:
        return hashlib.sha256(kind + content).hexdigest()[:16]
    content += bytes(-len(content) % 4096)
    words = [int.from_bytes(content[i : i + 8], "little") for i in range(0, len(content), 8)]
    rows = [sum(words[i : i + 512]) % 2**64 for i in range(0, len(words), 512)]
    columns = [sum(words[i::512]) % 2**64 for i in range(512)]
    sums = b"".join(value.to_bytes(8, "little") for value in rows + columns)
    return hashlib.sha256(kind + sums).hexdigest()[:16]


def random_bytes(count, seed=0):
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "count", [0, 1, 8, SHORT, SHORT + 1, SHORT + PAGE, 256 * PAGE, 256 * PAGE + 9, 700 * PAGE + 4095]
)
def test_digest_is_what_the_description_says(count):
    content = random_bytes(count)
    assert digest(content) == by_hand(content)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_digest_is_of_the_bytes_under_any_dtype(dtype):
    tensor = random_bytes(72 * 1024).view(dtype).view(3, -1)
    assert digest(tensor) == by_hand(tensor)
    assert digest(tensor.t()) == by_hand(tensor.t().contiguous())  # not of how it lies in memory
    assert digest(tensor) != digest(tensor.view(-1, 3)) != digest(tensor.view(torch.uint8))


def test_digest_of_a_number_and_of_nothing():
    assert digest(torch.tensor(1.5)) == hashlib.sha256(b"float32[]" + bytes([0, 0, 192, 63])).hexdigest()[:16]
    assert digest(torch.zeros(0, 3)) == hashlib.sha256(b"float32[0,3]").hexdigest()[:16]


@pytest.mark.parametrize("count", [40, SHORT + 33])
def test_every_flipped_bit_is_noticed(count):
    content, seen = random_bytes(count), set()
    places = range(count) if count < 100 else [*range(0, count, 997), count - 1]
    for place in places:
        for bit in range(8):
            content[place] ^= 1 << bit
            seen.add(digest(content))
            content[place] ^= 1 << bit
    assert len(seen) == 8 * len(places)
    assert digest(content) not in seen


@pytest.mark.parametrize("width", [8, PAGE, 16 * PAGE])
def test_parts_in_another_order_are_noticed(width):
    content = random_bytes(32 * 16 * PAGE)
    swapped = content.clone()
    swapped[:width], swapped[3 * width : 4 * width] = content[3 * width : 4 * width], content[:width].clone()
    assert digest(swapped) != digest(content)
