"""What is named as a checkpoint and is none is told at once."""

import os

import pytest

from optimum_sab.errors import ConfigError
from optimum_sab.sources import check_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, file in (("vlm", "config.json"), ("lora", "adapter_config.json"), ("empty", "x.bin")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    for number in (500, 1000):
        checkpoint = tmp_path / "trained" / f"checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
        os.utime(checkpoint, (number, number))
    return tmp_path


@pytest.mark.parametrize("source", ["vlm", "./vlm", "owner/vlm", "gpt2", "trained/checkpoint-500"])
def test_checkpoints_and_repositories_are_let_through(here, source):
    check_folder(source)


def test_a_checkpoint_in_a_subfolder_is_let_through(here):
    check_folder("trained", "checkpoint-500")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./nowhere", "there is no folder './nowhere'"),
        ("nowhere/", "there is no folder 'nowhere/'"),
        ("my model", "there is no folder 'my model'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
        ("vlm/config.json", "is a file; name the folder"),
        ("lora", "'lora': it holds an adapter alone.*merge_and_unload"),
        ("empty", "'empty': there is no config.json in it[.]$"),
        ("trained", "there is no config.json in it; did you mean 'trained/checkpoint-1000'[?]$"),
    ],
)
def test_what_is_no_checkpoint_is_named_with_what_to_do(here, source, said):
    with pytest.raises(ConfigError, match=said):
        check_folder(source)


def test_a_place_that_may_not_be_looked_into_is_named(shut):
    with shut.entered(), pytest.raises(ConfigError, match=r"barred' may not be looked into; have its permissions"):
        check_folder(str(shut.barred))
    with shut.entered(), pytest.raises(ConfigError, match=r"vlm' may not be looked into; have its permissions"):
        check_folder(str(shut.barred / "vlm"))
    with shut.entered(), pytest.raises(ConfigError, match=r"there is no config.json in it\.$"):
        check_folder(str(shut.passed))
