"""What users get wrong is one line, before a weight is read; faults of ours keep their traceback."""

import argparse
import ast
import errno
import json
import os
import re
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from optimum_sab.cli.commands import env
from optimum_sab.cli.main import main
from optimum_sab.errors import ConfigError, warn
from optimum_sab.failure import one_line
from optimum_sab.hf.processor import knows_no_token

ROOT = Path(__file__).parents[2]


def refused(capsys, *arguments):
    """The one line that a command ends with."""
    assert main([str(each) for each in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.splitlines()[-1:] == lines
    return lines[0]


def test_weights_that_are_missing_are_noticed_last(weightless, tmp_path, capsys):
    assert "no file named model.safetensors" in refused(capsys, "quantize", weightless, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device-map", "cuda"], ["device_map='cuda'", "no CUDA device"]),
        (["--device-map", "cuda:7"], ["device_map='cuda:7'", "torch sees the cpu"]),
        (["--device-map", "gpu"], ["device_map='gpu'", "torch sees the cpu"]),
        (["--device-map", "meta"], ["device_map='meta'", "torch sees the cpu"]),
        (["--device-map", "disk"], ["device_map='disk'", "torch sees the cpu"]),
        (["--calibration-device", "cuda:7"], ["--calibration-device cuda:7", "torch sees the cpu"]),
        (["--calibration-device", "mps:9"], ["--calibration-device mps:9", "torch sees the cpu"]),
        (["--calibration", "nowhere.jsonl"], ["'nowhere.jsonl'", "does not exist"]),
        (["--keep-dense", "nothing_like_it"], ["'nothing_like_it'", "names look like"]),
        (["--calibration-pass", "none"], ["--calibration-pass none"]),
        (["--resume-folder", "{out}/resume"], ["--resume-folder", "lies in the output"]),
        (["--resume-folder", "{out}"], ["--resume-folder", "lies in the output"]),
        (["--resume-folder", "/dev/null/resume"], ["--resume-folder '/dev/null/resume'", "name another"]),
    ],
)
def test_values_are_refused_before_a_weight_is_read(weightless, tmp_path, capsys, arguments, words):
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a CUDA device")
    given = [each.format(out=tmp_path / "out") for each in arguments]
    line = refused(capsys, "quantize", weightless, "--output", tmp_path / "out", *given)
    assert all(word in line for word in words)
    assert list(tmp_path.iterdir()) == []


def test_output_is_refused_before_a_weight_is_read(weightless, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "below a file" in refused(capsys, "quantize", weightless, "--output", tmp_path / "file" / "out")
    line = refused(capsys, "quantize", weightless, "--output", weightless, "--overwrite")
    assert "which is read from" in line
    assert (weightless / "config.json").exists()


def test_space_is_looked_at_before_a_weight_is_read(weightless, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: argparse.Namespace(free=1_000_000))
    line = refused(capsys, "quantize", weightless, "--output", tmp_path / "out")
    assert "0.001 GB free" in line and "another disk" in line


def test_processor_is_loaded_before_a_weight_is_read(weightless, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(weightless, broken)
    (broken / "tokenizer.json").write_text("{")
    (broken / "tokenizer_config.json").write_text("{")
    line = refused(capsys, "quantize", broken, "--output", tmp_path / "out")
    assert "no processor can be loaded" in line and "holds no file" not in line
    assert "--processor PATH, in Python SABConfig(processor=...)" in line


@pytest.mark.parametrize("config", [Qwen2Config, LlamaConfig], ids=["made up by Transformers 5", "refused by it"])
def test_model_without_a_tokenizer_is_not_calibrated_with_one_that_knows_no_token(tmp_path, capsys, config):
    config(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    line = refused(capsys, "quantize", tmp_path / "model", "--output", tmp_path / "out")
    assert "no processor can be loaded" in line and "SABConfig(processor=...)" in line and "--processor PATH" in line
    assert "(that folder holds no file of a tokenizer or processor)" in line and "sentencepiece" not in line


@pytest.mark.parametrize("below", ["", "below"])
def test_picture_model_without_a_processor_is_told_that_its_folder_holds_none(weightless, tmp_path, capsys, below):
    model = tmp_path / "model" / below
    model.mkdir(parents=True)
    shutil.copy(weightless / "config.json", model)
    more = ["--subfolder", below] if below else []
    line = refused(capsys, "quantize", tmp_path / "model", "--output", tmp_path / "out", *more)
    assert "no processor can be loaded" in line and "(that folder holds no file of a tokenizer or processor)" in line


@pytest.mark.parametrize(
    ("words", "added", "knows"),
    [
        ([], [], False),
        (["a"], [], True),
        (
            ["▁", "[START_REF]"],
            ["<extra_id_0>", "en_XX"],
            False,
        ),  # as made up for T5, mBART, Nougat
        (["▁", "▁a"], ["en_XX"], True),
    ],
)
def test_tokenizer_that_knows_special_tokens_alone_is_seen(words, added, knows):
    vocabulary = {token: index for index, token in enumerate(["<unk>", *words])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>"
    )
    tokenizer.add_tokens(added)
    assert knows_no_token(tokenizer) is not knows


def test_package_that_is_missing_is_noticed_before_a_weight_is_read(weightless, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "greenlet", None)
    assert "greenlet" in refused(capsys, "quantize", weightless, "--output", tmp_path / "out")


def test_truncated_weights_are_named(small_example, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(small_example, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    line = refused(capsys, "quantize", folder, "--output", tmp_path / "out")
    assert str(folder / "model.safetensors") in line and "fetch it again" in line


@pytest.mark.parametrize("model", ["./modle", "modle", "owner/modle", "/no/such/modle", "a/b/c"])
def test_mistyped_models_are_named(tmp_path, monkeypatch, capsys, model):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "quantize", model, "--output", "out")
    assert repr(model) in line and "folder" in line
    assert list(tmp_path.iterdir()) == []


def test_demo_looks_at_its_output_and_devices_first(small_example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("optimum_sab.example.demonstration.evaluate", lambda *_: pytest.fail("has begun"))
    monkeypatch.setattr("optimum_sab.example.demonstration.checkpoint_path", lambda: small_example)
    (tmp_path / "file").write_text("")
    assert "below a file" in refused(capsys, "demo", "--output", tmp_path / "file" / "out")
    assert "which is read from" in refused(capsys, "demo", "--output", small_example)
    assert "--calibration-device" in refused(capsys, "demo", "--calibration-device", "cuda:7")


@pytest.mark.parametrize(
    ("picture", "words"), [("out.nonsense", ".png"), ("missing/out.png", "cannot be written"), (".", "must end in")]
)
def test_eval_looks_at_the_picture_first(tmp_path, monkeypatch, capsys, picture, words):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optimum_sab.eval.subject.find_subject", lambda *_: pytest.fail("has begun"))
    line = refused(capsys, "eval", "quality", "example", "--picture", picture)
    assert f"--picture {picture!r}" in line and words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--calibration", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--methods", "defualt"], "method 'defualt' is unknown; did you mean 'default'?"),
    ],
)
def test_eval_looks_at_its_values_first(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr("optimum_sab.eval.subject.find_subject", lambda *_: pytest.fail("has begun"))
    assert words in refused(capsys, "eval", "quality", "example", *arguments)


# -- what happens while a command runs ---------------------------------------------------------------------------------


def running(monkeypatch, work):
    """`optimum-sab env` does this instead."""
    monkeypatch.setattr(env, "describe", work)


@pytest.fixture
def interruptible():
    """As in a terminal: what a script starts in the background ignores interruptions, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("resume", [None, "nothing finished", "a block finished"])
def test_interruption_exits_with_130(monkeypatch, capsys, tmp_path, small_example, resume):
    monkeypatch.setattr(
        "optimum_sab.cli.commands.quantize.auto_class", lambda source: signal.raise_signal(signal.SIGINT)
    )
    folder = tmp_path / "resume"
    folder.mkdir()
    if resume == "a block finished":
        (folder / "block-00000.safetensors").touch()
    arguments = ["quantize", str(small_example), "--output", str(tmp_path / "out")]
    assert main([*arguments, *(["--resume-folder", str(folder)] if resume else [])]) == 130
    err = capsys.readouterr().err
    assert err.startswith("interrupted") and err.count("\n") == 1
    assert (repr(str(folder)) in err) == (resume == "a block finished")


def test_interruption_that_says_what_stands_where_is_handed_on(monkeypatch, capsys):
    def work():
        raise KeyboardInterrupt("the upload did not come to its end.")

    running(monkeypatch, work)
    assert main(["env", "--json"]) == 130
    captured = capsys.readouterr()
    assert captured.err == "interrupted; the upload did not come to its end.\n"
    assert json.loads(captured.out)["exit_code"] == 130


def test_what_is_no_number_is_null_in_json(monkeypatch, capsys):
    running(monkeypatch, lambda: {"kl": float("nan"), "rows": [{"perplexity": float("inf")}]})
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"kl": None, "rows": [{"perplexity": None}]}


@pytest.mark.parametrize("call", [["env", "--json"], ["run", "--help"]], ids=["a command", "help of run"])
def test_output_that_nobody_reads_any_more_is_no_error(monkeypatch, call):
    running(monkeypatch, lambda: {"text": "x" * 1_000_000})
    out, read_out = os.pipe()[::-1]
    read_err, err = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_out)  # as `| head` does when it has seen enough
        sys.stdout, sys.stderr = os.fdopen(out, "w"), os.fdopen(err, "w")
        code = main(call)
        sys.stdout.flush()  # as at the end of a process
        sys.stderr.flush()
        os._exit(code)
    for each in (out, read_out, err):
        os.close(each)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 141
    with os.fdopen(read_err) as complaints:
        assert complaints.read() == ""


def test_warnings_have_lines_of_their_own(monkeypatch, capsys):
    def work():
        from tqdm.auto import tqdm

        with tqdm(total=3, desc="Working") as bar:
            bar.update()
            warn("first, about something")
            warn("second")
        raise ConfigError("the end")

    running(monkeypatch, work)
    assert main(["env"]) == 1
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line.strip() for line in lines if "about" in line or "second" in line or "end" in line] == [
        "warning: first, about something",
        "warning: second",
        "error: the end",
    ]


def test_faults_of_ours_are_not_hidden(monkeypatch):
    def work():
        raise KeyError("of ours")

    running(monkeypatch, work)
    with pytest.raises(KeyError):
        main(["env"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/out"), ["'/data/out'", "no space", "another disk"]),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ["no space", "another disk"]),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/data"), ["'/data'", "read-only"]),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), ["'/root/x'", "Permission denied", "name"]),
        (SafetensorError("Error: No space left on device (os error 28)"), ["no space", "another disk"]),
        (SafetensorError("incomplete metadata"), ["incomplete metadata", "fetch it again"]),
        (OSError("Can't load\n\n  the thing"), ["Can't load the thing"]),
        (ModuleNotFoundError("No module named 'accelerate'", name="accelerate"), ["'accelerate'", "pip install"]),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            ["CUDA out of memory", "--calibration-samples"],
        ),
        (MemoryError(), ["of the host", "--calibration-samples"]),
        (ConfigError("two\nlines"), ["two lines"]),
    ],
)
def test_error_is_one_line_with_value_and_remedy(error, words):
    line = one_line(error)
    assert all(word in line for word in words)
    assert "\n" not in line


def raised_from(*errors):
    """The last of errors that were each raised from the one before."""
    for cause, error in pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


OF_TRANSFORMERS = "Could not import module 'PreTrainedModel'. Are this object's requirements defined correctly?"
BELONGS = "install the torchvision that belongs to the installed torch"


@pytest.mark.parametrize(
    ("errors", "said", "remedy"),
    [
        ([RuntimeError("operator torchvision::nms does not exist")], "operator torchvision::nms", BELONGS),
        ([ModuleNotFoundError("No module named 'torchvision'", name="torchvision")], "'torchvision';", BELONGS),
        ([ImportError("cannot import name 'a' from 'torchvision.io'")], "'torchvision.io';", BELONGS),
        ([ModuleNotFoundError("No module named 'PIL'", name="PIL")], "'PIL';", "optimum-sab[quantize]"),
        ([ModuleNotFoundError("No module named 'greenlet.x'", name="greenlet.x")], "x';", "optimum-sab[quantize]"),
        ([ModuleNotFoundError("No module named 'av'", name="av")], "No module named 'av'; install it.", "install it"),
        ([ImportError("cannot import name 'x' from 'tqdm'")], "from 'tqdm'; ", "in a version that fits"),
    ],
)
@pytest.mark.parametrize("above", [0, 1, 2])
def test_the_cause_of_what_cannot_be_imported_is_told_with_its_own_remedy(errors, said, remedy, above):
    chain = [*errors, *(ModuleNotFoundError(OF_TRANSFORMERS) for _ in range(above))]
    line = one_line(raised_from(*chain))
    assert line.startswith("a package is missing or broken: ") and said in line and remedy in line
    assert OF_TRANSFORMERS not in line
    assert ("optimum-sab[quantize]" in line) == (remedy == "optimum-sab[quantize]")


def test_what_was_handled_before_is_no_cause_unless_it_is_an_import():
    def line(before):
        try:
            try:
                raise before
            except Exception:
                raise ImportError("requires the sentencepiece library")  # noqa: B904
        except ImportError as error:
            return one_line(error)

    assert ": requires the sentencepiece library; install what it names" in line(KeyError("kind"))
    assert ": No module named 'av'; " in line(ModuleNotFoundError("No module named 'av'", name="av"))


def test_the_extra_is_advised_for_what_it_installs():
    asked = re.search(r"^QUANTIZE = (\[.*\])$", (ROOT / "setup.py").read_text(), re.MULTILINE).group(1)
    packages = [each.partition(">")[0] for each in ast.literal_eval(asked)]
    for module in ["PIL" if each == "pillow" else each for each in packages]:
        error = ModuleNotFoundError(f"No module named {module!r}", name=module)
        assert "pip install 'optimum-sab[quantize]'" in one_line(error)


def test_error_of_the_program_has_no_line():
    assert one_line(RuntimeError("operator of ours")) is None
    assert one_line(ValueError("of ours")) is None
    assert one_line(IndexError()) is None
