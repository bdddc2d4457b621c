"""The datasets package itself, where it is installed; what is read of it is tested with a stand-in elsewhere."""

import pytest
from PIL import Image

from optimum_sab.calibration.samples.reading import read_samples

datasets = pytest.importorskip("datasets")
CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cup."}]
CALL = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}]


def test_rows_that_datasets_filled_up_are_read_as_they_were():
    """Every message gets every key, None where it has none."""
    rows = datasets.Dataset.from_list([{"messages": [*CHAT, *CALL]}, {"messages": CHAT}])
    assert set(rows[1]["messages"][0]) == {"role", "content", "tool_calls"}
    for source in (rows, rows.to_iterable_dataset()):
        assert read_samples(source, 8, 0, True) == [[*CHAT, {**CALL[0], "content": ""}], CHAT]


def test_pictures_may_be_decoded_or_not(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "What?", "image": Image.new("RGB", (8, 8), "red")}])
    decoded = rows.cast_column("image", datasets.Image())
    raw = rows.cast_column("image", datasets.Image(decode=False))
    decoded.to_parquet(tmp_path / "rows.parquet")
    for source in (decoded, raw, tmp_path / "rows.parquet", str(tmp_path / "rows.parquet")):
        [[message]] = read_samples(source, 8, 0, True)
        assert message["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)
