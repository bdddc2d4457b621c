import json

from optimum_sab.cli.main import main
from optimum_sab.example import checkpoint_path


def test_example_is_a_checkpoint_of_its_own(tmp_path, capsys):
    assert main(["example", str(tmp_path / "example-vlm"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    written = {file.name: file.read_bytes() for file in (tmp_path / "example-vlm").iterdir()}
    shipped = {file.name: file.read_bytes() for file in checkpoint_path().iterdir() if file.is_file()}
    assert written == shipped
    assert found["bytes"] == sum(map(len, shipped.values()))


def test_example_replaces_nothing(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["example", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_example_is_overwritten_when_asked(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["example", str(tmp_path), "--overwrite", "--quiet"]) == 0
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / "config.json").read_bytes() == (checkpoint_path() / "config.json").read_bytes()
