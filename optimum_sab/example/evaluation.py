"""How many questions of the example's tasks a model answers exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, ProcessorMixin

from optimum_sab.data.chat import Message, Turn, chat_messages
from optimum_sab.errors import ConfigError
from optimum_sab.example.tasks import TASKS, Question

MAX_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class TaskScore:
    """Right answers of one task."""

    task: str
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.count


@dataclass(frozen=True)
class Evaluation:
    """The scores of every task that was asked about: those of `TASKS` in their order, then others."""

    scores: tuple[TaskScore, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers over all questions, 0 to 1."""
        return sum(score.correct for score in self.scores) / sum(score.count for score in self.scores)

    def score(self, task: str) -> TaskScore:
        """The score of one task.

        Raises:
            ConfigError: if no question was about that task.
        """
        for score in self.scores:
            if score.task == task:
                return score
        asked = ", ".join(score.task for score in self.scores)
        raise ConfigError(f"task={task!r} was not evaluated; questions were about {asked}.")


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    batch_size: int = 50,
) -> Evaluation:
    """Ask a model every question and compare its greedy answers with the right ones, character for character.

    Args:
        model: a vision-language model with `generate`, on any device.
        processor: its processor.
        questions: what to ask, of any tasks in any order.
        batch_size: questions answered at a time; it changes speed only, up to rounding.

    Raises:
        ConfigError: if there are no questions or `batch_size` is not positive.
    """
    if not questions:
        raise ConfigError("questions is empty; draw some with held_out_questions(task, count, seed).")
    given = answer(model, processor, questions, batch_size)
    right = [reply == question.answer for reply, question in zip(given, questions, strict=True)]
    scores = []
    for task in dict.fromkeys([*TASKS, *(question.task for question in questions)]):
        marks = [mark for mark, question in zip(right, questions, strict=True) if question.task == task]
        if marks:
            scores.append(TaskScore(task=task, correct=sum(marks), count=len(marks)))
    return Evaluation(scores=tuple(scores))


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    batch_size: int = 50,
) -> list[str]:
    """The model's greedy answers, one for each question, in order.

    Questions with and without a picture are never put into one batch, so that a batch has pictures throughout or none.

    Raises:
        ConfigError: if `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1.")
    replies = [""] * len(questions)
    for pictured in (True, False):
        indices = [index for index, each in enumerate(questions) if (each.image is not None) == pictured]
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            texts = _answer_batch(model, processor, [questions[index] for index in chosen])
            for index, text in zip(chosen, texts, strict=True):
                replies[index] = text
    return replies


def question_messages(question: Question) -> list[Message]:
    """The question in the chat format of Transformers, the picture before the prompt."""
    return answered_messages(question)[:1]


def answered_messages(question: Question) -> list[Message]:
    """The question and its answer as a chat, to calibrate on or to compare predictions on."""
    return chat_messages([Turn(question.prompt, question.answer)], question.image)


@torch.inference_mode()
def _answer_batch(model: PreTrainedModel, processor: ProcessorMixin, questions: list[Question]) -> list[str]:
    texts = [
        processor.apply_chat_template(question_messages(each), tokenize=False, add_generation_prompt=True)
        for each in questions
    ]
    images = [each.image for each in questions if each.image is not None]
    inputs = processor(text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt").to(
        model.device
    )
    generated = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    replies = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(replies, skip_special_tokens=True)]
