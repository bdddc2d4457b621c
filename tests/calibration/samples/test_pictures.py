"""Pictures in every form they are handed around in."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from optimum_sab.calibration.samples.pictures import load_picture, load_video
from optimum_sab.errors import SampleError

COLOUR = (200, 100, 50)


@pytest.fixture
def png():
    file = io.BytesIO()
    Image.new("RGB", (6, 4), COLOUR).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def path(png, tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(png)
    return path


def forms(png, path):
    text = base64.b64encode(png).decode()
    pixels = np.broadcast_to(np.array(COLOUR, np.uint8), (4, 6, 3))
    return {
        "picture": Image.new("RGB", (6, 4), COLOUR),
        "with alpha": Image.new("RGBA", (6, 4), (*COLOUR, 7)),
        "path": path,
        "path as text": str(path),
        "relative to the folder": path.name,
        "file address": path.as_uri(),
        "data address": "data:image/png;base64," + text,
        "data address as Qwen spells it": "data:image;base64," + text,
        "data address of escaped bytes": "data:image/png," + "".join(f"%{byte:02x}" for byte in png),
        "base64": text,
        "base64 in lines": "\n".join(text[i : i + 60] for i in range(0, len(text), 60)),
        "bytes": png,
        "bytes of a row": {"bytes": png, "path": None},
        "bytes before the path": {"bytes": png, "path": "gone.png"},
        "path of a row": {"bytes": None, "path": str(path)},
        "array": pixels,
        "array, channels first": pixels.transpose(2, 0, 1),
        "array of floats": pixels / 255.0,
        "tensor": torch.tensor(pixels.copy()),
        "tensor in bfloat16 of one": torch.ones(3, 4, 6, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("form", forms(b"", Path("/a.png")))
def test_every_form_gives_the_same_picture(png, path, form):
    picture = load_picture(forms(png, path)[form], "sample", path.parent)
    assert (picture.mode, picture.size) == ("RGB", (6, 4))
    assert {colour for _, colour in picture.getcolors()} == {(255, 255, 255) if "of one" in form else COLOUR}


def test_address_of_the_web_is_left_to_the_processor():
    assert load_picture("https://example.org/a.png", "sample") == "https://example.org/a.png"


def test_picture_is_turned_upright():
    turned = Image.new("RGB", (6, 4))
    turned.getexif()[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=turned.getexif())
    assert load_picture(file.getvalue(), "sample").size == (4, 6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "a picture given as int"),
        ({"bytes": b"", "width": 3}, "a picture given as dict"),
        ("gone.png", "the picture 'gone.png' does not exist; mend the path, which counts from the working directory"),
        ("file:///gone.png", "the picture '/gone.png' does not exist"),
        ("a\0b.png", "does not exist"),
        ("a" * 5000 + ".png", "does not exist"),
        ("data:image/png;base64", "is a data address without data"),
        ("data:image/png;base64,!", "is not base64"),
        ("data:image/png;base64,aaaa", "cannot be read"),
        ("A" * 64, "cannot be read"),
        (
            b"no picture",
            "the picture of 10 bytes cannot be read: it is no picture file of a kind that Pillow knows, such as PNG or "
            "JPEG; convert it, or remove the sample.$",
        ),
        (Image.new("I;16", (4, 4)), "has the mode 'I;16', more than 8 bits a channel"),
        (Image.new("F", (4, 4)), "has the mode 'F', more than 8 bits a channel"),
        (np.zeros((5, 4, 5), np.uint8), r"a picture of shape \[5, 4, 5\]"),
        (np.zeros((0, 4, 3), np.uint8), r"a picture of shape \[0, 4, 3\]"),
        (np.full((4, 4, 3), 3.0), "a picture of float64 from 3.0 to 3.0; give uint8, or floats from 0 to 1"),
        (np.full((4, 4, 3), 300), "a picture of int64 from 300 to 300"),
    ],
)
def test_what_is_no_picture_is_named(source, message):
    with pytest.raises(SampleError, match=f"^sample.*{message}"):
        load_picture(source, "sample")


def test_torn_picture_is_named(png):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    with pytest.raises(SampleError, match=r"cannot be read: .*; fetch it again, or remove the sample\.$"):
        load_picture(file.getvalue()[:600], "sample")


def test_video_is_a_file_or_frames(path):
    assert load_video(path, "sample") == load_video(path.as_uri(), "sample") == str(path)
    assert load_video("https://example.org/a.mp4", "sample") == "https://example.org/a.mp4"
    assert [frame.size for frame in load_video([str(path), path], "sample")] == [(6, 4)] * 2
    with pytest.raises(SampleError, match=r"^sample: the file 'a.mp4' does not exist; mend the path, which"):
        load_video("a.mp4", "sample")


def test_a_file_that_may_not_be_looked_at_is_named(shut):
    for load, name in ((load_picture, "a.png"), (load_video, "a.mp4")):
        with shut.entered(), pytest.raises(SampleError, match=rf"^sample: .*{name}' may not be looked at; have the"):
            load(shut.barred / name, "sample")
