"""Pushed by huggingface_hub itself and loaded again in another process."""

import pytest
from huggingface_hub import ModelCard

PUSH = """
import sys
import optimum_sab
from optimum_sab import AutoModelForVision2Seq
folder, repo, options = sys.argv[1:4]
model = AutoModelForVision2Seq.from_pretrained(folder)
print(model.push_to_hub(repo, **eval(options)))
"""
LOAD = """
import hashlib, sys, torch
import optimum_sab
from optimum_sab import AutoModelForVision2Seq
name, options = sys.argv[1:3]
model = AutoModelForVision2Seq.from_pretrained(name, **eval(options))
with torch.no_grad():
    logits = model(input_ids=torch.arange(20, 40)[None]).logits
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""

PUSH_ADAPTER = """
import sys, torch
from peft import LoraConfig, get_peft_model
from optimum_sab import AutoModelForVision2Seq
model = AutoModelForVision2Seq.from_pretrained("owner/packed", dtype=torch.float32)
adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False))
adapted.push_to_hub("owner/adapter")
with torch.no_grad():
    print(float(adapted(input_ids=torch.arange(20, 40)[None]).logits.double().sum()))
"""
LOAD_ADAPTER = """
import torch
from optimum_sab import AutoModelForVision2Seq
model = AutoModelForVision2Seq.from_pretrained("owner/adapter", dtype=torch.float32)
with torch.no_grad():
    print(float(model(input_ids=torch.arange(20, 40)[None]).logits.double().sum()))
"""


@pytest.fixture
def push(call):
    def done(folder, repo, token="hf_writer", **options):
        return call("python", "-c", PUSH, folder, repo, options, token=token)

    return done


@pytest.fixture
def load(call, tmp_path):
    def done(name, environment_token="hf_writer", **options):
        given = {"cache_dir": str(tmp_path / "cache"), **options}
        result = call("python", "-c", LOAD, name, given, token=environment_token)
        return result.stdout.strip() if result.returncode == 0 else result

    return done


def card_of(hub, repo):
    return ModelCard(hub.repositories[repo].files()["README.md"].decode())


def test_a_model_that_was_pushed_is_loaded_by_its_name(hub, push, load, packed, digests):
    done = push(packed[0], "owner/vlm")
    assert done.returncode == 0, done.stderr
    assert load("owner/vlm") == digests[0]
    files = hub.repositories["owner/vlm"].files()
    assert {"README.md", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(files)
    card = card_of(hub, "owner/vlm")
    assert card.data.base_model == "owner/dense" and card.data.base_model_relation == "quantized"
    assert 'from_pretrained("owner/vlm")' in card.text


def test_a_card_that_somebody_wrote_stays_and_ours_is_written_anew(hub, push, put, packed, tmp_path):
    push(packed[0], "owner/vlm")
    ours = card_of(hub, "owner/vlm")
    assert push(packed[1], "owner/vlm", tags=["mine"]).returncode == 0
    again = card_of(hub, "owner/vlm")
    assert again.text.split("<!--")[0] == ours.text.split("<!--")[0]  # of figures that are the same
    assert again.data.tags == [*ours.data.tags, "mine"]

    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My model\n")
    put("owner/vlm", tmp_path)
    assert push(packed[0], "owner/vlm").returncode == 0
    assert card_of(hub, "owner/vlm").text.strip() == "# My model"


def test_a_card_that_transformers_made_gives_way_to_ours(hub, call, push, packed):
    """`processor.push_to_hub` before the model leaves its template, which nobody has filled in."""
    code = "import sys; from transformers import AutoTokenizer\n"
    code += "AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub('owner/vlm')"
    assert call("python", "-c", code, packed[0]).returncode == 0
    assert "[More Information Needed]" in card_of(hub, "owner/vlm").text
    assert push(packed[0], "owner/vlm").returncode == 0
    assert "packed to" in card_of(hub, "owner/vlm").text


def test_a_processor_that_was_pushed_before_stays(hub, push, put, packed, tmp_path):
    theirs = (packed[0] / "tokenizer_config.json").read_text().replace("{", '{"added_by_user": true,', 1)
    (tmp_path / "tokenizer_config.json").write_text(theirs)
    put("owner/vlm", tmp_path)
    assert push(packed[0], "owner/vlm").returncode == 0
    files = hub.repositories["owner/vlm"].files()
    assert files["tokenizer_config.json"].decode() == theirs
    assert "tokenizer.json" not in files and "preprocessor_config.json" in files  # of one tokenizer, or none


def test_a_private_model_is_refused_without_a_token(hub, push, load, packed, digests):
    assert push(packed[0], "owner/secret", private=True).returncode == 0
    assert hub.repositories["owner/secret"].private
    for token in (None, "hf_stranger"):
        refused = load("owner/secret", token)
        assert refused.returncode != 0 and "OSError: owner/secret is not a local folder" in refused.stderr
    assert load("owner/secret", None, token="hf_reader") == digests[0]


def test_an_interrupted_upload_leaves_what_was_there(hub, push, put, load, packed, digests):
    hub.uploads_left = 0
    assert push(packed[0], "owner/vlm").returncode != 0
    assert hub.repositories["owner/vlm"].files() == {}
    put("owner/vlm", packed[0])
    before = hub.repositories["owner/vlm"].files()
    assert "the line was cut" in push(packed[1], "owner/vlm").stderr
    assert hub.repositories["owner/vlm"].files() == before
    assert load("owner/vlm") == digests[0]


def test_each_revision_is_the_model_that_was_pushed_to_it(put, push, load, packed, digests):
    first = put("owner/vlm", packed[0])
    assert push(packed[1], "owner/vlm", revision="second").returncode == 0
    assert load("owner/vlm") == digests[0]
    assert load("owner/vlm", revision="second") == digests[1]
    put("owner/vlm", packed[1])
    assert load("owner/vlm", revision=first) == digests[0]


def test_a_model_in_a_subfolder_is_loaded(put, load, packed, digests):
    put("owner/several", packed[1], under="small/")
    put("owner/several", packed[0], under="large/")
    assert load("owner/several", subfolder="small") == digests[1]


def test_an_adapters_repository_loads_with_the_packed_model_that_it_names(hub, call, put, packed):
    pytest.importorskip("peft")
    put("owner/packed", packed[0])
    pushed = call("python", "-c", PUSH_ADAPTER)
    assert pushed.returncode == 0, pushed.stderr
    assert "model.safetensors" not in hub.repositories["owner/adapter"].files()
    loaded = call("python", "-c", LOAD_ADAPTER)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[-1] == pushed.stdout.split()[-1]
