"""`quantize --push-to-hub`, `inspect` and `eval` with a Hub behind them."""

import json

import pytest
from huggingface_hub import HfApi, ModelCard

from optimum_sab.hf.hub.push import PushTarget, push_folder

QUICK = ["--calibration-samples", "2", "--sequence-length", "32", "--iterations", "1", "--allocation", "uniform"]
QUICK += ["--sweeps", "0", "--no-temperature-scaling", "--json"]


@pytest.fixture
def quantize(call, smallest_example):
    def run(*options, token="hf_writer", model=smallest_example):
        return call("optimum-sab", "quantize", model, *QUICK, *options, token=token)

    return run


def test_quantize_uploads_what_it_wrote(hub, call, put, quantize, smallest_example, tmp_path):
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    put("owner/dense", tmp_path / "card", private=True)
    commit = put("owner/dense", smallest_example, branch="fine-tuned")
    done = quantize(
        "--push-to-hub", "vlm", "--private", "--revision", "fine-tuned", "--remote-code", model="owner/dense"
    )
    assert done.returncode == 0, done.stderr
    found = hub.repositories["owner/vlm"]
    assert found.private and json.loads(done.stdout)["repository"] == "owner/vlm"
    written = {path.name: path.read_bytes() for path in (tmp_path / "vlm").iterdir()}
    assert {name: data for name, data in found.files().items() if name != "README.md"} == {
        name: data for name, data in written.items() if name != "README.md"
    }
    assert {"tokenizer.json", "preprocessor_config.json", "configuration_sab.py"} <= set(written)
    card = ModelCard(found.files()["README.md"].decode())
    assert card.data.base_model == "owner/dense" and commit[:12] in card.text
    assert 'from_pretrained("owner/vlm")' in card.text


@pytest.mark.parametrize(
    ("repo", "options", "token", "said"),
    [
        ("owner/vlm", (), None, "error: there is no token for the Hub (Token is required"),
        ("owner/vlm", (), None, "log in with `hf auth login`"),
        ("owner/vlm", (), "hf_reader", "may only read"),
        ("owner/vlm", (), "hf_nonsense", "error: the token for the Hub is refused ("),
        ("owner/vlm", (), "hf_nonsense", "401"),
        ("owner/vlm", (), "hf_stranger", "403"),
        ("owner/public", (), "hf_stranger", "403"),
        ("owner/public", ("--private",), "hf_writer", "is public"),
        ("owner/a/b", (), "hf_writer", "NAMESPACE/NAME"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_work(
    hub, put, quantize, packed, tmp_path, repo, options, token, said
):
    put("owner/public", tmp_path)
    done = quantize("--push-to-hub", repo, *options, token=token)
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert set(hub.repositories) == {"owner/public"}


def test_the_repository_that_is_read_is_not_written_to(hub, put, quantize, smallest_example):
    put("owner/dense", smallest_example)
    done = quantize("--push-to-hub", "owner/dense", "--output", "out", model="owner/dense")
    assert done.returncode == 1 and "is the repository that is read from" in done.stderr


def test_nowhere_to_go_is_a_wrong_call(quantize):
    assert quantize().returncode == 2
    assert "--push-to-hub" in quantize("--output", "out", "--private").stderr


def test_a_finished_checkpoint_stays_when_the_upload_fails(hub, call, quantize, tmp_path):
    hub.uploads_left = 0
    done = quantize("--push-to-hub", "owner/vlm")
    assert done.returncode == 1 and "the line was cut" in done.stderr.splitlines()[-1]
    command = f"hf upload owner/vlm {tmp_path / 'vlm'}"
    assert command in done.stderr and hub.repositories["owner/vlm"].files() == {}
    assert call("optimum-sab", "inspect", tmp_path / "vlm", "--verify").returncode == 0


def test_an_interrupted_upload_says_where_everything_is(monkeypatch, packed):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: [])
    monkeypatch.setattr(HfApi, "create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"finished and lies in '{packed[0]}'.*hf upload owner/vlm {packed[0]}"):
        push_folder(packed[0], PushTarget("owner/vlm"))


def test_inspect_reads_a_repository(put, call, packed):
    commit = put("owner/several", packed[0], under="vlm/", private=True)
    put("owner/several", packed[1], under="other/")
    where = ["owner/several", "--subfolder", "vlm", "--revision", commit]
    here = json.loads(call("optimum-sab", "inspect", packed[0], "--verify", "--json").stdout)
    there = call("optimum-sab", "inspect", *where, "--verify", "--json", "--token", "hf_reader", token=None)
    assert json.loads(there.stdout) == here
    refused = call("optimum-sab", "inspect", "owner/several", "--cache-dir", "other", token=None)
    assert refused.returncode == 1 and "owner/several" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_eval_reads_a_repository(put, call, smallest_example):
    commit = put("owner/dense", smallest_example, private=True)
    small = ["--samples", "2", "--length", "16", "--held-out", "1", "--window", "16", "--probes", "2"]
    done = call(
        *("optimum-sab", "eval", "quality", "owner/dense", "--revision", commit, "--token", "hf_reader"),
        *("--methods", "rtn-sign", *small, "--json"),
        token=None,
    )
    assert done.returncode == 0, done.stderr
    assert [row["method"] for row in json.loads(done.stdout)["rows"]] == ["dense", "rtn-sign"]
