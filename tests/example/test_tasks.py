import random
import re

import pytest

from optimum_sab.data.held_out import is_reserved
from optimum_sab.data.scenes import COLOURS, KINDS, PLACES
from optimum_sab.errors import ConfigError
from optimum_sab.example.tasks import (
    IMAGE_SIZE,
    SUBJECTS,
    TASKS,
    held_out_questions,
    random_facts,
    training_conversation,
    training_questions,
)

VALID_ANSWERS = {
    "colour": set(COLOURS),
    "shape": set(KINDS),
    "counting": {"1", "2", "3", "4", "5"},
    "position": {place for row in PLACES for place in row},
}


def contents(question):
    """The shapes of a scene question as (row, column, colour, kind), read back from its key."""
    return [(int(cell[0]), int(cell[1]), *cell[3:].split(" ")) for cell in question.key.split(";")]


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_determined_by_the_seed(task):
    first, again = held_out_questions(task, 20, seed=1), held_out_questions(task, 20, seed=1)
    assert [(q.prompt, q.answer, q.key) for q in first] == [(q.prompt, q.answer, q.key) for q in again]
    if task != "text":
        assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, again, strict=True))
    assert [q.key for q in first] != [q.key for q in held_out_questions(task, 20, seed=2)]


@pytest.mark.parametrize("task", TASKS)
def test_held_out_and_training_questions_share_no_key(task):
    held_out = {question.key for question in held_out_questions(task, 300, seed=0)}
    training = {question.key for question in training_questions(task, 300, seed=0)}
    assert all(map(is_reserved, held_out))
    assert not any(map(is_reserved, training))


def test_training_conversations_never_contain_a_reserved_key():
    rng = random.Random(0)
    for index in range(600):
        conversation = training_conversation(rng, SUBJECTS[index % 3])
        assert conversation.keys
        assert not any(map(is_reserved, conversation.keys))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_answers_are_well_formed(task):
    for question in held_out_questions(task, 200, seed=0):
        assert question.task == task
        assert question.prompt.endswith("?")
        assert question.prompt == question.prompt.strip()
        assert question.answer == question.answer.strip() != ""
        assert question.answer in VALID_ANSWERS.get(task, {question.answer})
        if task == "text":
            assert question.image is None
        else:
            assert question.image.size == (IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("task", TASKS)
def test_answers_cannot_be_guessed(task):
    answers = [question.answer for question in held_out_questions(task, 400, seed=0)]
    assert max(map(answers.count, set(answers))) / len(answers) < 0.4


def test_colour_answers_agree_with_the_scene():
    for question in held_out_questions("colour", 200, seed=0):
        kind = re.fullmatch(r"What colour is the (\w+)\?", question.prompt)[1]
        assert [colour for _, _, colour, each in contents(question) if each == kind] == [question.answer]


def test_shape_answers_agree_with_the_scene():
    for question in held_out_questions("shape", 200, seed=0):
        colour = re.fullmatch(r"What shape is (\w+)\?", question.prompt)[1]
        assert [kind for _, _, each, kind in contents(question) if each == colour] == [question.answer]


def test_counting_answers_agree_with_the_scene():
    for question in held_out_questions("counting", 200, seed=0):
        assert question.answer == str(len(contents(question)))


def test_position_answers_agree_with_the_scene():
    for question in held_out_questions("position", 200, seed=0):
        subject = re.fullmatch(r"Where is the (\w+) (\w+)\?", question.prompt).groups()
        places = [PLACES[row][column] for row, column, *each in contents(question) if tuple(each) == subject]
        assert places == [question.answer]


def test_reading_answers_are_the_number_on_the_sign():
    assert all(question.answer == question.key for question in held_out_questions("reading", 50, seed=0))


def test_text_answers_follow_from_the_prompt():
    for question in held_out_questions("text", 300, seed=0):
        passage, prompt = question.prompt[: len(question.key)], question.prompt[len(question.key) + 1 :]
        assert passage == question.key
        owners = dict(re.findall(r"(\w+) has the (\w+)\.", passage))
        if owners:
            asked = re.fullmatch(r"Who has the (\w+)\?|What does (\w+) have\?", prompt)
            thing, name = asked.groups()
            assert question.answer == (owners[name] if name else {v: k for k, v in owners.items()}[thing])
            continue
        words = passage.removeprefix("List: ").removesuffix(".").split(", ")
        if after := re.fullmatch(r"What comes after (\w+)\?", prompt):
            assert question.answer == words[words.index(after[1]) + 1]
        else:
            end = re.fullmatch(r"What is the (first|last) word of the list\?", prompt)[1]
            assert question.answer == words[{"first": 0, "last": -1}[end]]


def test_facts_key_is_what_the_passage_states():
    facts = random_facts(random.Random(0))
    assert facts.key == facts.passage
    assert len(facts.turns) >= 4


@pytest.mark.parametrize("call", [held_out_questions, training_questions])
def test_questions_refuse_an_unknown_task_and_an_empty_count(call):
    with pytest.raises(ConfigError, match="smell"):
        call("smell", 1, 0)
    with pytest.raises(ConfigError, match="count=0"):
        call("colour", 0, 0)


def test_conversation_refuses_an_unknown_subject():
    with pytest.raises(ConfigError, match="weather"):
        training_conversation(random.Random(0), "weather")
