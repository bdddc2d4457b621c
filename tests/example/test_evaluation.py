import dataclasses

import pytest
import torch
from transformers import AutoModelForImageTextToText

from optimum_sab.errors import ConfigError
from optimum_sab.example import checkpoint_path
from optimum_sab.example.evaluation import answer, evaluate, question_messages
from optimum_sab.example.tasks import TASKS, held_out_questions
from optimum_sab.hf.processor import load_processor


@pytest.fixture(scope="module")
def example():
    path = checkpoint_path()
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32), load_processor(path)


@pytest.fixture(scope="module")
def questions():
    return [question for group in zip(*(held_out_questions(task, 4, seed=1) for task in TASKS)) for question in group]


def test_answer_keeps_the_order_of_mixed_questions(example, questions):
    forwards = answer(*example, questions)
    assert answer(*example, questions[::-1]) == forwards[::-1]
    assert len(set(forwards)) > 4


def test_answer_does_not_depend_on_the_batch(example, questions):
    assert answer(*example, questions, batch_size=1) == answer(*example, questions, batch_size=24)


def test_evaluate_counts_exact_matches_of_each_task(example, questions):
    given = answer(*example, questions)
    known = [dataclasses.replace(each, answer=reply) for each, reply in zip(questions, given)]
    spoiled = [dataclasses.replace(each, answer=each.answer + "x") if each.task == "shape" else each for each in known]
    evaluation = evaluate(*example, spoiled)
    assert [score.task for score in evaluation.scores] == list(TASKS)
    assert {score.task: score.accuracy for score in evaluation.scores} == {
        task: 0.0 if task == "shape" else 1.0 for task in TASKS
    }
    assert evaluation.score("shape").count == 4
    assert evaluation.accuracy == pytest.approx(5 / 6)


def test_evaluation_refuses_a_task_it_did_not_see(example, questions):
    evaluation = evaluate(*example, questions[:1])
    with pytest.raises(ConfigError, match="text"):
        evaluation.score("text")


def test_evaluate_refuses_no_questions_and_an_empty_batch(example, questions):
    with pytest.raises(ConfigError, match="empty"):
        evaluate(*example, [])
    with pytest.raises(ConfigError, match="batch_size=0"):
        evaluate(*example, questions, batch_size=0)


def test_question_messages_put_the_picture_first(questions):
    kinds = {each.task: [part["type"] for part in question_messages(each)[0]["content"]] for each in questions}
    assert kinds == {task: ["text"] if task == "text" else ["image", "text"] for task in TASKS}
