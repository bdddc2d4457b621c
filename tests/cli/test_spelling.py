"""Messages of the command line name settings as it takes them."""

import pytest

from optimum_sab.cli.arguments.parser import build_parser
from optimum_sab.cli.main import main
from optimum_sab.cli.spelling import as_options


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            "With stream_weights=True and activation_memory=1 it is 2 GB.",
            "With --stream-weights and --activation-memory 1 it is 2 GB.",
        ),
        ("With allocation='uniform' it is 2.0 GB.", "With --allocation uniform it is 2.0 GB."),
        ("calibration='builtin'.", "--calibration builtin."),
        ("target_bits=0.5 must be a number", "--target-bits 0.5 must be a number"),
        ("refit=False; temperature_scaling=False", "--no-refit; --no-temperature-scaling"),
        (
            "give fewer samples (calibration_samples), sequence_length cuts",
            "give fewer samples (--calibration-samples), --sequence-length cuts",
        ),
        ("calibration='one text, of words' is", "--calibration 'one text, of words' is"),
        ("seed=-1 must be", "--seed -1 must be"),
        ("calibration=./a/b.jsonl", "calibration=./a/b.jsonl"),
        ("the code of a calibration with a seed", "the code of a calibration with a seed"),
        ("SABConfig(stream_weights=True) or stream_weights=True", "SABConfig(stream_weights=True) or --stream-weights"),
        ("SABConfig.light(seed=1)", "SABConfig.light(seed=1)"),
        (
            '\'{"down_proj": {"base_planes": 2}}\' and base_planes',
            '\'{"down_proj": {"base_planes": 2}}\' and --base-planes',
        ),
        ("/tmp/resume_folder/x and my_seed=3", "/tmp/resume_folder/x and my_seed=3"),
        ("use 'target_bits'", "use 'target_bits'"),
        ("(calibration=...)", "(--calibration ...)"),
        ("calibration=open('x.txt').read().split('.')", "calibration=open('x.txt').read().split('.')"),
        ("calibration=data['train'] or calibration=data", "calibration=data['train'] or --calibration data"),
        ('calibration=[row["text"] for row in rows]', 'calibration=[row["text"] for row in rows]'),
        ("calibration='x.txt'.split(), or seed=1", "calibration='x.txt'.split(), or --seed 1"),
        ("seed=1 (of the set), seed=torch.initial_seed()", "--seed 1 (of the set), seed=torch.initial_seed()"),
    ],
)
def test_settings_are_spelt_as_options(told, said):
    assert as_options(told) == said
    assert as_options(said) == said


def test_an_error_names_the_option_that_was_given(capsys):
    assert main(["plan", "nowhere", "--target-bits", "0.5"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --target-bits 0.5 must be a number above 1") and "--base-planes" in said


def test_what_is_said_parses_again():
    said = as_options("With calibration_samples=64, stream_weights=True and allocation='uniform'")
    words = [word.strip(",") for word in said.split() if word not in ("With", "and")]
    options = build_parser("optimum-sab").parse_args(["plan", "m", *words])
    assert (options.calibration_samples, options.stream_weights, options.allocation) == (64, True, "uniform")
