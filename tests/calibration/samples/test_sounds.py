from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from optimum_sab.calibration.samples.encoding import encode_samples
from optimum_sab.calibration.samples.rows import read_row
from optimum_sab.calibration.samples.sounds import Sound, load_sound, sound_for
from optimum_sab.errors import SampleError

WAVE = np.linspace(-0.5, 0.5, 40)


@pytest.mark.parametrize(
    ("source", "rate"),
    [
        (WAVE, None),
        (list(WAVE), None),
        (torch.tensor(WAVE)[None], None),
        ({"array": WAVE, "sampling_rate": 16000}, 16000),
        ({"array": WAVE, "sampling_rate": 16000, "path": None}, 16000),
        (
            SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=torch.tensor(WAVE)[None], sample_rate=44100)),
            44100,
        ),
        (Sound(WAVE.astype(np.float32), 8000), 8000),
    ],
)
def test_sound_of_every_form_is_a_wave_of_one_channel(source, rate):
    found = load_sound(source, "row")
    assert found.rate == rate
    assert found.wave.dtype == np.float32
    np.testing.assert_array_equal(found.wave, WAVE.astype(np.float32))


def test_files_are_looked_for_and_left_to_the_processor(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    path = str(tmp_path / "a.wav")
    for source in (path, tmp_path / "a.wav", f"file://{path}", {"bytes": None, "path": path}):
        assert load_sound(source, "row") == path
    assert load_sound("a.wav", "row", tmp_path) == path
    assert load_sound("https://example.org/a.wav", "row") == "https://example.org/a.wav"
    with pytest.raises(SampleError, match=r"^row: the file .*b\.wav' does not exist"):
        load_sound("b.wav", "row", tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 40)), r"a sound of shape \[2, 40\]; give finite numbers \[samples\], one channel"),
        (np.zeros(0), r"shape \[0\]"),
        ([0.0, float("nan")], "finite"),
        (["a"], "cannot be made an array"),
        ({"array": WAVE}, "a mapping of array, which is not understood"),
        ({"bytes": b"RIFF", "path": None}, "a mapping of bytes, path, which is not understood"),
        (5, "given as int, which is not understood"),
    ],
)
def test_what_is_no_sound_is_named(source, message):
    with pytest.raises(SampleError, match=f"^row has .*{message}"):
        load_sound(source, "row")


def test_another_sampling_rate_is_an_error_and_an_unknown_one_is_taken():
    wave = WAVE.astype(np.float32)
    assert sound_for(Sound(wave, 16000), 16000, "row") is wave
    assert sound_for(Sound(wave), 16000, "row") is wave
    assert sound_for(Sound(wave, 8000), None, "row") is wave
    assert sound_for("a.wav", 16000, "row") == "a.wav"
    with pytest.raises(SampleError, match=r"44100 samples a second and the model's processor wants 16000; resample"):
        sound_for(Sound(wave, 44100), 16000, "row")


class Processor:
    """Keeps what it was given."""

    chat_template = "has one"
    tokenizer = SimpleNamespace()
    feature_extractor = SimpleNamespace(sampling_rate=16000)

    def __init__(self):
        self.given = []

    def apply_chat_template(self, messages, **options):
        self.given.append(messages)
        return BatchFeature({"input_ids": torch.ones(1, 4), "input_features": torch.ones(1, 3, 8)})


@pytest.mark.parametrize(
    "row",
    [
        {"text": "What is said?", "audio": {"array": WAVE, "sampling_rate": 16000}},
        {"question": "What is said?", "audios": [WAVE]},
        [{"role": "user", "content": [{"type": "audio", "audio": WAVE}, {"type": "text", "text": "What is said?"}]}],
        {"messages": [{"role": "user", "content": "<audio>What is said?"}], "audio": WAVE},
    ],
)
def test_rows_with_sound_come_to_the_processor_as_waves(row):
    processor = Processor()
    sample, _ = read_row(row, "row")
    assert read_row(sample, "row")[0] == sample or isinstance(sample, list)  # reading what was read changes nothing
    encode_samples([sample], processor, 64)
    [[message]] = processor.given
    sound, text = message["content"]
    assert text == {"type": "text", "text": "What is said?"}
    np.testing.assert_array_equal(sound["audio"], WAVE.astype(np.float32))


def test_the_rate_of_a_row_is_compared_with_the_processor_s():
    row = {"text": "What is said?", "audio": {"array": WAVE, "sampling_rate": 8000}}
    with pytest.raises(SampleError, match="calibration sample 0 has a sound with 8000"):
        encode_samples([row], Processor(), 64)
