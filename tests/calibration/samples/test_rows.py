"""Rows as trainers and datasets have them."""

import base64
import copy
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from optimum_sab.calibration.samples.reading import read_samples
from optimum_sab.calibration.samples.rows import read_row
from optimum_sab.errors import SABWarning, SampleError

ASK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cup."}]
RED, BLUE = (255, 0, 0), (0, 0, 255)
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def picture(colour):
    return Image.new("RGB", (8, 8), colour)


def plain(value):
    """Pictures as their colour, so that samples compare."""
    if isinstance(value, Image.Image):
        return value.getpixel((0, 0))
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def read(row):
    return plain(read_row(row, "row")[0])


def user(*content):
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return {"role": "user", "content": parts}


TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]
SHOWN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, ASK[1]]
FORMS = {
    "text": ({"text": "One."}, "One."),
    "nothing counts as absent": ({"text": "One.", "messages": None, "image": None, "tools": None}, "One."),
    "messages": ({"messages": ASK}, ASK),
    "ShareGPT": ({"conversations": TURNS}, ASK),
    "ShareGPT without a column": (TURNS, ASK),
    "prompt": ({"prompt": "One"}, "One"),
    "prompt and completion": ({"prompt": "One", "completion": " two."}, "One two."),
    "prompt and completion as messages": ({"prompt": ASK[:1], "completion": ASK[1:]}, ASK),
    "question and answer": ({"question": "What?", "answer": "A cup."}, ASK),
    "instruction": ({"instruction": "What?", "input": "", "output": "A cup."}, ASK),
    "instruction with input": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    "system": ({"messages": ASK, "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, *ASK]),
    "empty system": ({"messages": ASK, "system": ""}, ASK),
    "tools": ({"messages": ASK, "tools": [CLOCK]}, {"messages": ASK, "tools": [CLOCK]}),
    "tools as JSON": ({"messages": ASK, "tools": json.dumps([CLOCK])}, {"messages": ASK, "tools": [CLOCK]}),
    "no tools": ({"messages": ASK, "tools": []}, ASK),
    "text and image": ({"text": "What?", "image": picture(RED)}, [user(RED, "What?")]),
    "mark in front": ({"text": "<image>\nWhat?", "image": picture(RED)}, [user(RED, "What?")]),
    "marks in the text": (
        {"text": "Is <image> or <image>?", "images": [picture(RED), picture(BLUE)]},
        [user("Is ", RED, "or ", BLUE, "?")],
    ),
    "LLaVA": (
        {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, TURNS[1]], "image": picture(RED)},
        [user(RED, "What?"), ASK[1]],
    ),
    "placeholders": ({"messages": SHOWN, "images": [picture(RED)]}, [user(RED, "What?"), ASK[1]]),
    "placeholders of two turns": (
        {"messages": [*SHOWN, *SHOWN], "images": [picture(RED), picture(BLUE)]},
        [user(RED, "What?"), ASK[1], user(BLUE, "What?"), ASK[1]],
    ),
    "placeholders with an index": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "index": 1, "text": None},
                        {"type": "text", "text": "or", "index": None},
                        {"type": "image", "index": 0},
                    ],
                }
            ],
            "images": [picture(RED), picture(BLUE)],
        },
        [user(BLUE, "or", RED)],
    ),
    "no placeholder": ({"messages": ASK, "images": [picture(RED)]}, [user(RED, "What?"), ASK[1]]),
    "no placeholder behind a system message": (
        {"messages": ASK, "images": [picture(RED)], "system": "Look."},
        [{"role": "system", "content": "Look."}, user(RED, "What?"), ASK[1]],
    ),
    "no pictures": ({"messages": ASK, "images": []}, ASK),
    "parts without a type": (
        [{"role": "user", "content": [{"image": picture(RED)}, {"text": "What?"}]}],
        [user(RED, "What?")],
    ),
    "a server's part": (
        [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "https://a.org/b", "detail": "low"}}],
            }
        ],
        [user("x") | {"content": [{"type": "image", "image": "https://a.org/b"}]}],
    ),
    "call of a tool": (
        [ASK[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "clock", "arguments": {}}]}],
        [ASK[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {}}]}],
    ),
    "message with empty columns": (
        [{"role": "user", "content": "What?", "tool_calls": None, "name": None}],
        [{"role": "user", "content": "What?"}],
    ),
    "frames": (
        {"messages": [{"role": "user", "content": "<video>What?"}], "videos": [[picture(RED), picture(BLUE)]]},
        [{"role": "user", "content": [{"type": "video", "video": [RED, BLUE]}, {"type": "text", "text": "What?"}]}],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_row_becomes_its_sample_and_stays_as_it_was(form):
    row, expected = FORMS[form]
    before = plain(copy.deepcopy(row))
    sample, unused = read_row(row, "row")
    assert plain(sample) == expected
    assert unused == []
    assert plain(row) == before


@pytest.mark.parametrize("form", FORMS)
def test_reading_what_was_read_changes_nothing(form):
    sample, _ = read_row(FORMS[form][0], "row")
    assert read(sample) == plain(sample)


def test_columns_that_are_no_part_of_the_sample_are_told():
    assert read_row({"prompt": "What?", "messages": ASK, "id": 4, "score": None}, "row") == (ASK, ["prompt", "id"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": SHOWN, "images": [picture(RED)] * 2}, r"brings 2 image\(s\) for 1 placeholder\(s\)"),
        ({"text": "<image> <image>", "image": picture(RED)}, r"brings 1 image\(s\) for 2 placeholder\(s\)"),
        (
            {"messages": [user(picture(RED), "What?")], "images": [picture(RED)]},
            "a column of images and messages that bring their own",
        ),
        ({"messages": ASK[1:], "images": [picture(RED)]}, "no message of the user to put them in"),
        ({"messages": ASK, "image": picture(RED), "images": []}, "the columns 'image' and 'images'; keep one"),
        ({"messages": ASK, "audio": "a.wav"}, "the file .a.wav. does not exist"),
        ({"messages": ASK, "documents": []}, "a column 'documents', which is not understood"),
        ({"messages": ASK, "functions": [CLOCK]}, "a column 'functions', which is not understood"),
        (
            {"text": "What?", "image_url": "https://a.org/b"},
            "a column 'image_url', .* are read from image, images, vid",
        ),
        ({"text": "What?", "Pictures": ["a.png"]}, "a column 'Pictures', which is not understood"),
        ({"question": "What?", "answer": "A cup.", "frames": []}, "a column 'frames', which is not understood"),
        ({"messages": ASK, "attachments": ["a.png"]}, "a column 'attachments', which is not understood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "index": 0}]}]},
            "a part of type 'text' with 'index', which is not understood",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": picture(RED), "index": 0}]}]},
            "a part of type 'image' with 'index', which is not understood",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "index": [0]}]}], "images": [picture(RED)]},
            r"a part of type 'image' with the index \[0\], which is no whole number",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "index": False}]}], "image": picture(RED)},
            "a part of type 'image' with the index False, which is no whole number",
        ),
        ([{"from": "human", "value": "a", "content": "b"}], "with 'from', 'value' and 'content'; remove"),
        ({"messages": [{"role": "system", "content": "a"}, *ASK], "system": "b"}, "messages that begin with their own"),
        ({"messages": ASK, "system": 5}, "'system' must be a text, and is the int 5"),
        (
            {"messages": ASK, "tools": "clock"},
            r"'tools' is a string that is not JSON \(Expecting value at character 0\)",
        ),
        ({"messages": ASK, "tools": {"name": "clock"}}, "'tools' must be a list of JSON schemas"),
        ({"messages": [{"from": "narrator", "value": "a"}]}, "a message from 'narrator'; use one of human, user"),
        ({"messages": [{"role": 5, "content": "a"}]}, "a message with the role 5"),
        ({"messages": [{"role": "user", "content": None}]}, "a message with the content 'None'"),
        ({"messages": "hello"}, "'messages' must be a list of messages"),
        ({"label": 3}, "has columns label; one of 'messages', 'text'"),
        ({"text": ["a", "b"]}, r"'text' must be a text, and is the list \['a', 'b'\]"),
        ({"tools": [CLOCK]}, "has columns tools; one of"),
    ],
)
def test_row_that_is_not_understood_is_named(row, message):
    with pytest.raises(SampleError, match=f"^row:? .*{message}"):
        read_row(row, "row")


def nested(depth):
    inner = {}
    for _ in range(depth):
        inner = {"a": [inner]}
    return inner


def endless():
    inner = {}
    inner["a"] = inner
    return inner


@pytest.mark.parametrize("inner", [nested(800), endless()], ids=["deep", "endless"])
@pytest.mark.parametrize(
    "row",
    [
        lambda inner: [{"role": "user", "content": "What?", "more": inner}],
        lambda inner: {"messages": ASK, "tools": [inner]},
        lambda inner: {"input_ids": [1], "more": [inner]},
    ],
    ids=["message", "tools", "prepared"],
)
def test_what_is_nested_too_deeply_is_named_or_told(row, inner):
    refusal = ""
    try:
        assert read_row(row(inner), "row")[1] == ["more"]
    except SampleError as error:
        refusal = str(error)
    assert refusal in ("", "row is nested too deeply to be read, or holds itself.")
    assert refusal or "input_ids" in row(inner)  # a remark is not looked into


def test_entries_of_a_message_that_are_no_texts_are_read_as_such():
    assert read([{"role": "user", "content": "What?", 5: "a"}]) == [{**ASK[0], "5": "a"}]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("photo", "if it holds the picture, call it 'image'; if not, remove it, or the row."),
        ("Picture", "if it holds the picture, call it 'image'; if not, "),
        ("img", "if it holds the picture, call it 'image'; if not, "),
        ("photos", "if it holds the pictures, call it 'images'; if not, "),
        ("clip", "if it holds the video, call it 'video'; if not, "),
        ("audio_path", "if it holds the sound, call it 'audio'; if not, "),
        ("attachments", "not understood; remove it, or the row."),
    ],
)
def test_media_under_another_name_are_told_their_name(name, hint):
    row = {"question": "What?", "answer": "A cup.", name: "a.png"}
    with pytest.raises(SampleError, match=f"^row has a column '{name}', which is not understood; ") as error:
        read_row(row, "row")
    assert hint in str(error.value)


def test_media_beside_those_of_the_usual_name_are_to_be_removed():
    with pytest.raises(SampleError, match="'photo', which is not understood; remove it, or the row"):
        read_row({"question": "What?", "image": picture(RED), "photo": "a.png"}, "row")


NAMED = [
    ("a/photo.jpg", 'names a picture .* such as {"image": "a/photo.jpg", "question": "...", "answer": "..."}'),
    ("PHOTO.JPEG", "names a picture "),
    (" b.png\n", 'such as {"image": "b.png"'),
    ("https://a.org/b.webp?size=2", 'such as {"image": "https://a.org/b.webp'),
    ("a.mp4", 'names a video .* such as {"video": "a.mp4"'),
    ("a.wav", 'names a sound .* such as {"audio": "a.wav"'),
    ("x.jsonl", "names a file .*give calibration='x.jsonl', or the rows"),
    ("data/x.PARQUET", "give calibration='data/x.PARQUET'"),
    ("notes.txt", r"such as calibration=open\('notes.txt'\)"),
    ("x.jsonl.gz", "unpack it"),
]


@pytest.mark.parametrize(("name", "said"), NAMED)
@pytest.mark.parametrize("row", [str, lambda name: {"text": name}, lambda name: {"caption": name}])
def test_a_text_that_is_the_name_of_a_file_is_no_sample(row, name, said):
    with pytest.raises(SampleError, match=r"^calibration sample 1 is '.*would be calibrated on as a text; ") as error:
        read_samples(["A text.", row(name)], 8, 0, True)
    assert re.search(said, str(error.value))


def test_a_path_object_is_told_how_files_are_given():
    with pytest.raises(SampleError, match=r'such as {"image": "a/b\.png"'):
        read_row(Path("a/b.png"), "row")
    with pytest.raises(SampleError, match=r"^row is a PosixPath; give a text"):
        read_row(Path("a/b"), "row")


@pytest.mark.parametrize(
    "text",
    [
        "A cup in a.png",
        "a.jpg is\nwhat.jpg",
        "a.jpg\nb.jpg",
        "photo",
        ".png",
        "jpg",
        "The end.",
        "main.py",
        "x" * 5000 + ".png",
        "a b\0.png",
    ],
)
def test_other_texts_with_names_in_them_are_samples(text):
    assert read(text) == text == read({"text": text})


def test_a_name_with_spaces_is_one_where_it_leads_to_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read("my photo.jpg") == "my photo.jpg"
    picture(RED).save("my photo.jpg")
    with pytest.raises(SampleError, match=r'"image": "my photo\.jpg"'):
        read("my photo.jpg")


def test_a_name_beside_a_picture_or_with_an_answer_is_a_text():
    assert read({"text": "a.png", "image": picture(RED)})[0]["content"][-1] == {"type": "text", "text": "a.png"}
    assert read({"question": "a.png", "answer": "A cup."})[0]["content"] == "a.png"


IN_MESSAGES = (
    *("image_url", "video_url", "audio_url", "input_audio", "attachments", "pictures", "media", "frames", "documents"),
    *("image", "images", "videos", "audios", "image_path", "image_urls", "img", "Photo", "input_image", "sound_file"),
)


@pytest.mark.parametrize("name", IN_MESSAGES)
@pytest.mark.parametrize("turn", [{"role": "user", "content": "What?"}, {"from": "human", "value": "What?"}])
def test_media_in_a_message_beside_its_content_are_refused(turn, name):
    with pytest.raises(SampleError, match=f"^row has a message with the entry '{name}', which is not understood; put"):
        read_row([{**turn, name: ["a.png"]}], "row")
    assert read([{**turn, name: None}]) == ASK[:1]


def test_how_closely_a_server_shall_look_is_told_to_be_left_out():
    def chat(**more):
        part = {"type": "image_url", "image_url": {"url": "https://a.org/b", **more}}
        return [{"role": "user", "content": [part]}]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_row(chat(), "row")
        read_row(chat(detail="auto"), "row")
    with pytest.warns(
        SABWarning, match="pictures with 'detail', by which servers choose a size: it is left out"
    ) as told:
        read_samples([chat(detail="low"), chat(detail="high")], 8, 0, True)
    assert len(told) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
CONTENT = st.text() | st.lists(
    st.dictionaries(st.sampled_from(["type", "text", "image", "url", "index", "video"]), JSON, max_size=3), max_size=3
)
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls", "name", "media"]), JSON | CONTENT
    ),
    max_size=3,
)
ROW = st.dictionaries(
    st.sampled_from(["messages", "conversations", "text", "prompt", "image", "images", "tools", "system", "input_ids"]),
    JSON | MESSAGES,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(JSON | ROW)
def test_whatever_a_line_holds_is_a_sample_or_a_named_error(row):
    refusal = ""
    try:
        sample, _ = read_row(row, "row")
    except SampleError as error:
        refusal = str(error)
    assert refusal.startswith("row") if refusal else isinstance(sample, str) or sample


# -- prepared arguments ------------------------------------------------------------------------------------------------


def test_prepared_arguments_become_tensors_of_one_sample():
    row = {
        "input_ids": [5, 6, 7],
        "attention_mask": np.ones(3, int),
        "pixel_values": torch.ones(2, 4),
        "labels": [5, 6, 7],
        "text": "a",
        "meta": {"id": 5},
    }
    inputs, unused = read_row(row, "row")
    assert unused == ["labels", "text", "meta"]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in inputs.items()} == {
        "input_ids": (torch.int64, (1, 3)),
        "attention_mask": (torch.int64, (1, 3)),
        "pixel_values": (torch.float32, (2, 4)),
    }
    assert inputs["input_ids"].tolist() == [[5, 6, 7]]
    again, _ = read_row(inputs, "row")
    assert all(torch.equal(again[name], value) for name, value in inputs.items())


def test_padding_is_left_out():
    row = {"input_ids": [[0, 0, 5, 6]], "attention_mask": [[0, 0, 1, 1]], "position_ids": [[1, 1, 0, 1]]}
    inputs, _ = read_row(row, "row")
    assert {name: value.tolist() for name, value in inputs.items()} == {
        "input_ids": [[5, 6]],
        "attention_mask": [[1, 1]],
        "position_ids": [[0, 1]],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [[5, 6], [7, 8]]}, r"has the shape \[2, 2\]; a sample is one row"),
        ({"input_ids": 5}, "'input_ids' must be whole numbers"),
        ({"input_ids": "5 6"}, "'input_ids' must be whole numbers"),
        ({"input_ids": [0.5]}, "'input_ids' must be whole numbers"),
        ({"input_ids": [[5], [6, 7]]}, "'input_ids' cannot be made a tensor"),
        (
            {"input_ids": [5, 6], "attention_mask": [1]},
            r"'attention_mask' has the shape \[1, 1\], and 'input_ids' \[1, 2\]",
        ),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long, device="meta")}, "'input_ids' is on the device meta"),
        (
            {"input_ids": [5], "attention_mask": torch.ones(1, 1, device="meta")},
            "'attention_mask' is on the device meta",
        ),
        ({"input_ids": [5], "pixel_values": [[1.0], [1.0, 2.0]]}, "'pixel_values' cannot be made a tensor"),
    ],
)
def test_arguments_that_are_not_one_sample_are_named(row, message):
    with pytest.raises(SampleError, match=f"^row: .*{message}"):
        read_row(row, "row")


def test_a_long_base64_text_is_no_path(tmp_path):
    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(file)
    text = base64.b64encode(file.read_bytes()).decode()
    assert len(text) > 4096
    [message] = read_row({"text": "What?", "image": text}, "row")[0]
    assert message["content"][0]["image"].size == (64, 64)
