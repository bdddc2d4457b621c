"""A checkpoint that brings the file is loaded in a process that imports nothing of ours."""

import json

import pytest

from optimum_sab import AutoModelForVision2Seq
from optimum_sab.hf.hub.remote_code import FILE, add_remote_code, brings_code

TRUST = """
import hashlib, sys, torch
import transformers
kind = getattr(transformers, "AutoModelForImageTextToText")
model = kind.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
with torch.no_grad():
    logits = model(input_ids=torch.arange(20, 40)[None]).logits
model.save_pretrained("again")
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def bringing(packed, tmp_path_factory):
    model = AutoModelForVision2Seq.from_pretrained(packed[0])
    add_remote_code(model)
    folder = tmp_path_factory.mktemp("bringing")
    model.save_pretrained(folder)
    return folder


def test_it_is_loaded_by_its_name_and_saved_again_with_the_file(put, fresh, bringing, digests, tmp_path):
    put("owner/vlm", bringing)
    done = fresh(TRUST, "owner/vlm")
    assert done.stdout.strip() == digests[0], done.stderr
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "configuration_sab.Qwen2_5_VLConfig"}
    assert (tmp_path / "again" / FILE).read_text() == (bringing / FILE).read_text()
    assert "trust_remote_code=True" in (tmp_path / "again" / "README.md").read_text()


def test_without_the_package_the_error_says_what_to_install(put, fresh, bringing):
    put("owner/vlm", bringing)
    done = fresh("import sys; sys.modules['optimum_sab'] = None\n" + TRUST, "owner/vlm")
    assert done.returncode != 0 and "pip install optimum-sab" in done.stderr.splitlines()[-1]


def test_a_checkpoint_that_was_read_without_trust_keeps_the_file(bringing, tmp_path):
    model = AutoModelForVision2Seq.from_pretrained(bringing)
    assert brings_code(model.config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_text() == (bringing / FILE).read_text()


@pytest.mark.parametrize("others", [{}, {"AutoModel": "modeling_mine.Mine"}], ids=["ours alone", "another's too"])
def test_a_dense_model_of_it_does_not_name_the_file(bringing, tmp_path, others):
    model = AutoModelForVision2Seq.from_pretrained(bringing)
    model.config.auto_map.update(others)
    model.dequantize().save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    assert json.loads((tmp_path / "config.json").read_text()).get("auto_map", {}) == others
