import pytest
import torch

from optimum_sab.data.builtin import builtin_samples
from optimum_sab.errors import ConfigError
from optimum_sab.eval.methods import read_method
from optimum_sab.eval.quality import compare_quality
from optimum_sab.eval.reader.architecture import write_reader
from optimum_sab.eval.subject import Budget, find_subject

BUDGET = Budget(samples=4, length=96, held_out=1, window=32, questions=2, probes=2)


@pytest.fixture(scope="module")
def folder(language, vision, tmp_path_factory):
    return str(write_reader(language, tmp_path_factory.mktemp("subject") / "reader", vision))


def test_reader_is_known_by_its_checkpoint_and_asked_both_tasks(folder, cifar):
    subject = find_subject(folder, "tasks", BUDGET, cifar=cifar)
    assert subject.name == "reader"
    assert [q.task for q in subject.questions] == ["reading", "reading", "naming", "naming"]
    assert len(subject.probes) == 2 and all("pixel_values" in probe for probe in subject.probes)
    assert len(subject.calibration(0)) == 4
    assert subject.calibration(0) != subject.calibration(1)
    assert {question.task for question in find_subject(folder, None, BUDGET).questions} == {"reading"}


def test_mixed_calibration_takes_turns_with_the_built_in_set(folder, cifar):
    mixed = find_subject(folder, "mixed", BUDGET, cifar=cifar).calibration(0)
    own = find_subject(folder, "tasks", BUDGET, cifar=cifar).calibration(0)
    built_in = builtin_samples(4, 0)
    assert mixed == [own[0], built_in[0], own[1], built_in[1]]


def test_reader_is_compared_like_any_model(folder, cifar):
    subject = find_subject(folder, "tasks", BUDGET, torch.float32, cifar)
    method = read_method("default,iterations=1,sweeps=0,allocation=uniform")
    with pytest.warns(match="rank-deficient"):
        quality = compare_quality(subject, [method], [0])
    assert set(quality.dense.accuracy) == {"reading", "naming"}
    assert set(quality.rows[0].layer_error) == {"text", "visual"}
    assert quality.rows[0].bits_per_weight < 4


def test_cifar_is_refused_where_nothing_asks_for_it(language, cifar):
    with pytest.raises(ConfigError, match="is for the reader only"):
        find_subject(str(language), None, BUDGET, cifar=cifar)
