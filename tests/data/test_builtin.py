import pytest
from PIL import Image

from optimum_sab.calibration.samples.encoding import encode_samples
from optimum_sab.calibration.samples.modality import token_modalities
from optimum_sab.data.builtin import IMAGE_SIZE, builtin_samples
from optimum_sab.data.chat import Turn
from optimum_sab.data.passages import text_samples
from optimum_sab.data.questions import SCENE_TASKS, scene_turns
from optimum_sab.data.scenes import PALETTE, Scene, Shape
from optimum_sab.errors import ConfigError
from optimum_sab.example import checkpoint_path
from optimum_sab.hf.processor import load_processor


def pictures(sample):
    return [part["image"] for message in sample for part in message["content"] if part["type"] == "image"]


def texts(sample):
    return [part["text"] for message in sample for part in message["content"] if part["type"] == "text"]


def flat(samples):
    """Comparable: pictures as bytes."""
    return [s if isinstance(s, str) else ([p.tobytes() for p in pictures(s)], texts(s)) for s in samples]


def test_builtin_samples_are_determined_by_the_seed():
    assert flat(builtin_samples(6, seed=4)) == flat(builtin_samples(6, seed=4))
    first, other = flat(builtin_samples(6, seed=4)), flat(builtin_samples(6, seed=5))
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_more_builtin_samples_begin_with_the_fewer():
    assert flat(builtin_samples(7))[:4] == flat(builtin_samples(4))


@pytest.mark.parametrize("visual", [True, False])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_builtin_samples_are_as_many_as_asked(count, visual):
    assert len(builtin_samples(count, visual=visual)) == count


@pytest.mark.parametrize("count", [0, -3, 50_001, 10**9])
def test_builtin_samples_refuse_a_count_that_is_none_or_fills_the_memory(count):
    with pytest.raises(ConfigError, match=f"calibration_samples={count} must be from 1 to 50000"):
        builtin_samples(count)


def test_builtin_samples_rotate_through_scene_text_document_and_chat_about_a_text():
    samples = builtin_samples(12, image_size=64)
    kinds = ["text" if isinstance(s, str) else texts(s)[-2] if pictures(s) else "chat" for s in samples]
    assert kinds == ["Describe the picture.", "text", "Read everything.", "chat"] * 3


def test_builtin_chats_about_a_text_answer_from_what_they_quote():
    for chat in builtin_samples(40, image_size=64)[3::4]:
        quoted = texts(chat)[0]
        assert "\n\n" in quoted
        answers = [message["content"][0]["text"] for message in chat if message["role"] == "assistant"]
        assert answers
        assert any(answer in quoted for answer in answers)


def test_builtin_samples_without_pictures_are_all_texts():
    samples = builtin_samples(5, seed=2, visual=False, words=50)
    assert samples == text_samples(5, seed=2, words=50)
    assert all(len(sample.split()) >= 50 for sample in samples if sample.isascii())


@pytest.mark.parametrize("size", [64, IMAGE_SIZE])
def test_builtin_chats_show_one_picture_of_the_size_in_their_first_message(size):
    for chat in builtin_samples(3, image_size=size)[::2]:
        assert [part["type"] for part in chat[0]["content"]] == ["image", "text"]
        [picture] = pictures(chat)
        assert isinstance(picture, Image.Image)
        assert (picture.size, picture.mode) == ((size, size), "RGB")
        assert len({picture.getpixel((x, y)) for x in range(0, size, 4) for y in range(0, size, 4)}) > 1


def test_builtin_chats_alternate_questions_and_answers():
    for chat in builtin_samples(8, image_size=64)[::2]:
        assert [message["role"] for message in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert all(texts(chat))
        assert len(texts(chat)) == len(chat)
        assert len(chat) >= 4


@pytest.mark.compat
def test_builtin_samples_are_encoded_with_both_modalities():
    processor = load_processor(checkpoint_path())
    inputs = encode_samples(builtin_samples(4, words=60), processor, 128)
    config = type("Config", (), {"image_token_id": processor.image_token_id})
    counts = [(m.count("text"), m.count("visual")) for m in (token_modalities(i, config) for i in inputs)]
    assert all(text > 0 for text, _ in counts)
    assert [visual > 0 for _, visual in counts] == [True, False, True, False]
    assert [i["input_ids"].shape[1] <= 128 for i in inputs[1::2]] == [True, True]


# -- the questions they are made of ---------------------------------------------------------------------------------


def shape(kind, colour, row, column):
    centre = ((column + 0.5) / 3, (row + 0.5) / 3)
    return Shape(kind, colour, row, column, centre, radius=0.13, angle=0.0, tint=PALETTE[colour])


SCENE = Scene((150,) * 3, (shape("star", "red", 0, 0), shape("circle", "red", 1, 1), shape("star", "blue", 2, 2)))


@pytest.mark.parametrize(
    ("task", "turns"),
    [
        ("colour", [Turn("What colour is the circle?", "red")]),
        ("shape", [Turn("What shape is blue?", "star")]),
        ("counting", [Turn("How many shapes are there?", "3")]),
        (
            "position",
            [
                Turn("Where is the red star?", "top left"),
                Turn("Where is the red circle?", "centre"),
                Turn("Where is the blue star?", "bottom right"),
            ],
        ),
    ],
)
def test_scene_turns_ask_only_what_has_one_answer(task, turns):
    assert scene_turns(task, SCENE) == turns


def test_scene_turns_leave_out_twins():
    twins = Scene((150,) * 3, (shape("star", "red", 0, 0), shape("star", "red", 2, 2)))
    assert [turn for task in SCENE_TASKS for turn in scene_turns(task, twins)] == [
        Turn("How many shapes are there?", "2")
    ]


def test_scene_turns_refuse_another_task():
    with pytest.raises(ConfigError, match="task='reading' is not about scenes; choose one of colour, shape"):
        scene_turns("reading", SCENE)
