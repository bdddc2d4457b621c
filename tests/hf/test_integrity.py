"""What was saved is what is loaded: digests, files of one save, biases, finite values."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, modeling_utils

from optimum_sab import AutoModelForVision2Seq, SABConfig, SABLinear
from optimum_sab.errors import ConfigError, FormatError, SABWarning
from optimum_sab.format.digest import digest
from optimum_sab.format.random_weight import random_packed
from optimum_sab.hf.inventory import read_inventory, verify_inventory

FIVE = int(transformers.__version__.split(".")[0]) >= 5
LAYER = "layers.1.mlp.down_proj"


def load(folder, **settings):
    return AutoModelForVision2Seq.from_pretrained(folder, **settings)


def full_name(tensors, end):
    return next(name for name in sorted(tensors) if name.endswith(end) and "visual" not in name)


def metadata_of(path):
    with safe_open(path, framework="pt") as handle:
        return handle.metadata()


def rewrite(folder, change, fresh=False):
    """Change the tensors of a single file; its metadata stays as it was, or is fresh as if it was saved like this."""
    path = folder / "model.safetensors"
    tensors, metadata = load_file(path), metadata_of(path)
    change(tensors)
    (modeling_utils.safe_save_file if fresh else save_file)(tensors, path, metadata=metadata)
    return folder


def change_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(settings)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def flip(end, bit=3, place=-1):
    def change(tensors):
        tensors[full_name(tensors, end)].view(-1).view(torch.uint8)[place] ^= 1 << bit

    return change


@pytest.fixture(scope="module")
def saved(packed_vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = packed_vlm()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "copy")


# -- digests -----------------------------------------------------------------------------------------------------------


def test_every_stored_tensor_has_its_digest(packed_vlm, saved, tmp_path):
    model, folder = saved
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    found = {}
    for path in (*shards, folder / "model.safetensors"):
        digests = json.loads(metadata_of(path)["sab_digests"])
        assert digests == {name: digest(tensor) for name, tensor in load_file(path).items()}
        found.update(digests) if path.parent == tmp_path else None
    assert found == digests  # sharding changes nothing
    saves = {metadata_of(path)["sab_weights"] for path in (*shards, folder / "model.safetensors")}
    assert saves == {json.loads((folder / "config.json").read_text())["quantization_config"]["measured"]["weights"]}


def test_saving_again_writes_the_same_bytes(packed_vlm, saved, tmp_path):
    packed_vlm().save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (saved[1] / name).read_bytes()


def test_a_changed_model_is_saved_with_fresh_digests(packed_vlm, saved, tmp_path):
    model = load(saved[1])
    with torch.no_grad():
        layer = model.get_submodule(full_name(dict(model.named_modules()), LAYER))
        layer.weight[0, 0, 0] ^= 1
        model.get_input_embeddings().weight[3] += 1.0
    parent = model.get_submodule(full_name(dict(model.named_modules()), "layers.0.mlp"))
    other = random_packed(512, 256, parent.up_proj.settings, seed=9)
    parent.up_proj = SABLinear.from_packed(other)
    model.save_pretrained(tmp_path)
    assert verify_inventory(read_inventory(tmp_path)).differ == ()
    again = load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    old, new = (metadata_of(folder / "model.safetensors")["sab_weights"] for folder in (saved[1], tmp_path))
    assert old != new


def test_a_model_in_another_dtype_is_saved_with_the_digests_of_that_dtype(saved, tmp_path):
    load(saved[1], dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert verify_inventory(read_inventory(tmp_path)).differ == ()
    assert load(tmp_path, dtype="auto").get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "tensor", ["weight", "residual_sign", "residual_index", "row_scale", "row_exponent", "col_scale", "bias"]
)
def test_a_flipped_bit_in_a_packed_layer_is_found_at_loading(copy, tensor):
    end = "layers.1.self_attn.q_proj." + tensor
    rewrite(copy, flip(end, bit=0, place=5))
    with pytest.raises(FormatError, match=rf"{end}: not what was saved"):
        load(copy)
    assert [name.endswith(end) for name in verify_inventory(read_inventory(copy)).differ] == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_that_loading_casts_is_compared_in_its_file(copy, dtype):
    load(copy, dtype=dtype)
    rewrite(copy, flip("layers.1.self_attn.q_proj.bias", bit=0))
    with pytest.raises(FormatError, match=r"q_proj\.bias: not what was saved"):
        load(copy, dtype=dtype)


def test_two_layers_in_each_other_s_place_are_found(copy):
    def swap(tensors):
        a, b = (full_name(tensors, f"mlp.{name}.weight") for name in ("gate_proj", "up_proj"))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    with pytest.raises(FormatError, match=r"gate_proj\.weight and 1 more: not what was saved"):
        load(rewrite(copy, swap))


def test_the_switch(copy, saved):
    rewrite(copy, flip(f"{LAYER}.weight"))
    found = load(copy, quantization_config=SABConfig(verify=False)).state_dict()
    different = {name for name, tensor in saved[0].state_dict().items() if not torch.equal(tensor, found[name])}
    assert different == {full_name(found, f"{LAYER}.weight")}


def test_a_flipped_bit_elsewhere_is_found_when_it_is_asked_for(copy):
    rewrite(copy, flip("embed_tokens.weight", bit=2))
    load(copy)
    assert [name.endswith("embed_tokens.weight") for name in verify_inventory(read_inventory(copy)).differ] == [True]
    if FIVE:
        with pytest.raises(FormatError, match=r"embed_tokens\.weight: not what was saved"):
            load(copy, quantization_config=SABConfig(verify="all"))


def test_a_dequantized_model_is_made_of_verified_layers(copy):
    settings = {"quantization_config": SABConfig(dequantize=True)}
    assert not any(isinstance(m, SABLinear) for m in load(copy, **settings).modules())
    rewrite(copy, flip(f"{LAYER}.weight"))
    with pytest.raises(FormatError, match="not what was saved"):
        load(copy, **settings)


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloaded_layers_are_compared_in_their_file(copy, tmp_path, place):
    pytest.importorskip("accelerate")
    if place == "disk" and not FIVE:
        pytest.skip("refused there")
    names = [name for name, module in load(copy).named_modules() if name and not list(module.children())]
    device_map = {name: place if "language_model.layers.1" in name else "cpu" for name in names}
    settings = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    load(copy, **settings)
    rewrite(copy, flip(f"{LAYER}.weight"))
    with pytest.raises(FormatError, match=r"down_proj\.weight: not what was saved"):
        load(copy, **settings)


def test_the_base_model_class_verifies_too(copy):
    AutoModel.from_pretrained(copy)
    rewrite(copy, flip(f"{LAYER}.weight"))
    with pytest.raises(FormatError, match="not what was saved"):
        AutoModel.from_pretrained(copy)


def test_a_checkpoint_without_digests_loads_as_before(copy, saved, recwarn):
    path = copy / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["measured"] = None
    (copy / "config.json").write_text(json.dumps(config))
    found = load(copy).state_dict()
    assert not [w for w in recwarn if issubclass(w.category, SABWarning)]
    assert all(torch.equal(tensor, found[name]) for name, tensor in saved[0].state_dict().items())
    with pytest.raises(FormatError, match="carries no digests"):
        verify_inventory(read_inventory(copy))


def test_files_written_again_without_digests_are_said_to_be_unverified(copy):
    path = copy / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.warns(SABWarning, match=r"model\.safetensors has no digests although config\.json"):
        load(copy)


def test_an_earlier_release_finds_no_setting_it_does_not_know(saved):
    """0.1.0 refuses unknown settings, and takes any mapping as ``measured``."""
    known = {
        *("allocation", "base_planes", "block_size", "calibration", "calibration_device", "calibration_pass"),
        *("calibration_samples", "damping", "dynamic", "feedback", "format_version", "iterations", "measured"),
        *("modules_to_not_convert", "propagation", "quant_method", "refine", "refine_epochs", "refine_steps", "refit"),
        *("residual_planes", "row_scale", "salient_fraction", "seed", "sequence_length", "significance", "sweeps"),
        *("target_bits", "temperature_scaling"),
    }
    config = json.loads((saved[1] / "config.json").read_text())
    assert set(config["quantization_config"]) <= known


def test_a_hub_snapshot_is_verified(saved, tmp_path):
    cache = tmp_path / "models--someone--vlm-sab"
    snapshot = cache / "snapshots" / ("0" * 40)
    shutil.copytree(saved[1], snapshot)
    rewrite(snapshot, flip(f"{LAYER}.weight"))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    with pytest.raises(FormatError, match=r"down_proj\.weight: not what was saved"):
        AutoModelForVision2Seq.from_pretrained("someone/vlm-sab", cache_dir=tmp_path)  # offline, as all tests are


# -- one save ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_saves(packed_vlm, tmp_path_factory):
    """Folders of two models, each whole and in shards."""
    folder = tmp_path_factory.mktemp("two")
    for seed in (0, 1):
        packed_vlm(seed).save_pretrained(folder / f"whole{seed}")
        packed_vlm(seed).save_pretrained(folder / f"shards{seed}", max_shard_size="1MB")
    return folder


SHARD = "model-00002-of-00004.safetensors"


@pytest.mark.parametrize(
    ("kind", "taken", "message"),
    [
        ("whole", ["config.json"], "config.json and model.safetensors were not written by one save"),
        ("whole", ["model.safetensors"], "config.json and model.safetensors were not written by one save"),
        ("shards", [SHARD], f"model-00001-of-00004.safetensors and {SHARD} were not written by one save"),
        ("shards", ["config.json"], "config.json and model-00001-of-00004.safetensors were not written by one save"),
    ],
)
def test_a_mixture_of_two_saves_is_named(two_saves, tmp_path, kind, taken, message):
    folder = shutil.copytree(two_saves / f"{kind}0", tmp_path / "mixed")
    for name in taken:
        shutil.copy(two_saves / f"{kind}1" / name, folder / name)
    for read in (load, read_inventory):
        with pytest.raises(FormatError, match=f"{message}.*Save the model again into an empty folder"):
            read(folder)


def test_shards_beside_a_single_file_of_an_earlier_save_are_named(packed_vlm, two_saves, tmp_path):
    """Transformers leaves that file there, and prefers it."""
    folder = shutil.copytree(two_saves / "whole0", tmp_path / "both")
    packed_vlm(1).save_pretrained(folder, max_shard_size="1MB")
    with pytest.raises(FormatError, match=r"config\.json and model\.safetensors were not written by one save"):
        load(folder)


def test_a_single_file_beside_shards_of_an_earlier_save_is_read(packed_vlm, two_saves, tmp_path):
    folder = shutil.copytree(two_saves / "shards0", tmp_path / "both")
    model = packed_vlm(1)
    model.save_pretrained(folder)
    assert verify_inventory(read_inventory(folder)).differ == ()
    assert torch.equal(load(folder).get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_an_index_that_forgets_a_shard_is_named(two_saves, tmp_path):
    folder = shutil.copytree(two_saves / "shards0", tmp_path / "lost")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != SHARD}
    path.write_text(json.dumps(index))
    for read in (load, read_inventory):
        with pytest.raises(FormatError, match=f"'{SHARD}' is not among the files"):
            read(folder)


def test_a_dense_tensor_that_a_file_lost_or_gained_is_named(copy, tmp_path):
    other = shutil.copytree(copy, tmp_path / "other")
    rewrite(copy, lambda tensors: tensors.pop(full_name(tensors, "norm.weight")))
    with pytest.raises(FormatError, match=r"norm\.weight: missing, though model\.safetensors was saved with it"):
        load(copy)
    rewrite(other, lambda tensors: tensors.update({"lm_head.bias": torch.zeros(3)}))
    with pytest.raises(FormatError, match=r"lm_head\.bias: in model\.safetensors, which was saved without it"):
        load(other)


@pytest.mark.parametrize("setting", [{"block_size": 544}, {"salient_fraction": 0.1876}])
def test_settings_that_have_the_same_shapes_and_mean_other_weights_are_named(copy, setting):
    with pytest.raises(FormatError, match=f"was saved with {next(iter(setting))}="):
        load(change_config(copy, **setting))


def test_a_rule_that_leaves_a_packed_layer_dense_is_named(copy):
    with pytest.raises(FormatError, match="down_proj: packed in the checkpoint, but its quantization_config leaves it"):
        load(change_config(copy, modules_to_not_convert=["down_proj"]))


# -- biases and finite values ------------------------------------------------------------------------------------------


def test_a_missing_bias_is_named(copy):
    rewrite(copy, lambda tensors: tensors.pop(full_name(tensors, "layers.0.self_attn.k_proj.bias")), fresh=True)
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.k_proj: tensor 'bias' is missing"):
        load(copy)


def test_a_bias_that_the_model_does_not_have_is_named(copy):
    def add(tensors):
        name = full_name(tensors, f"{LAYER}.weight")
        tensors[name.removesuffix("weight") + "bias"] = torch.zeros(tensors[name].shape[1])

    with pytest.raises(FormatError, match="tensor 'bias' is in the checkpoint, but the model has none"):
        load(rewrite(copy, add, fresh=True))


def test_a_misshapen_bias_is_named(copy):
    def shorten(tensors):
        name = full_name(tensors, "layers.0.self_attn.k_proj.bias")
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(FormatError, match="tensor 'bias' is F32"):
        load(rewrite(copy, shorten, fresh=True))


@pytest.mark.skipif(not FIVE, reason="4.57 names the tensor itself")
@pytest.mark.parametrize("end", ["embed_tokens.weight", "norm.weight", "qkv.weight", "patch_embed.proj.weight"])
def test_a_misshapen_dense_tensor_is_named(copy, end):
    def flatten(tensors):
        name = next(name for name in sorted(tensors) if name.endswith(end))
        tensors[name] = tensors[name].flatten()[:-1].clone()

    rewrite(copy, flatten, fresh=True)
    with pytest.raises(FormatError, match=rf"tensor '\S*{end}' is F32 \(\d+,\), and the model's is \(\d.*fetch both"):
        load(copy)


@pytest.mark.skipif(not FIVE, reason="4.57 names the tensor itself")
def test_a_misshapen_dense_tensor_in_a_state_dict_is_named_and_left_to_transformers_where_that_is_asked_for(saved):
    model, folder = saved
    state = model.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"][:-1]
    settings = {"config": AutoConfig.from_pretrained(folder), "state_dict": state}
    with pytest.raises(FormatError, match=r"tensor 'lm_head\.weight' is F32"):
        type(model).from_pretrained(None, **settings)
    loaded = type(model).from_pretrained(None, **settings, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape == model.lm_head.weight.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "end", ["self_attn.q_proj.bias", "input_layernorm.weight", "embed_tokens.weight", "lm_head.weight", "qkv.weight"]
)
def test_nan_and_inf_are_named_wherever_they_are(copy, value, end):
    def poison(tensors):
        tensors[next(name for name in tensors if name.endswith(end))].view(-1)[7] = value

    with pytest.raises(FormatError, match=f"{end} holds NaN or inf"):
        load(rewrite(copy, poison, fresh=True))


def test_a_value_that_does_not_fit_the_dtype_is_named(copy):
    def enlarge(tensors):
        tensors[full_name(tensors, "embed_tokens.weight")][0, 0] = 1e6

    load(rewrite(copy, enlarge, fresh=True))
    with pytest.raises(FormatError, match=r"embed_tokens\.weight holds NaN or inf.*do not fit into float16"):
        load(copy, dtype=torch.float16)


@pytest.mark.skipif(not FIVE, reason="4.57 refuses disk")
def test_nan_in_what_is_offloaded_is_named(copy, tmp_path):
    pytest.importorskip("accelerate")
    names = [name for name, module in load(copy).named_modules() if name and not list(module.children())]
    device_map = {name: "disk" if "visual" in name else "cpu" for name in names}

    def poison(tensors):
        tensors[next(name for name in tensors if name.endswith("qkv.weight"))][0, 0] = float("nan")

    rewrite(copy, poison, fresh=True)
    with pytest.raises(FormatError, match=r"qkv\.weight holds NaN or inf"):
        load(copy, device_map=device_map, offload_folder=tmp_path / "offload")


# -- settings of a call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [{"dequantize": True}, {"backend": "reference"}, {"verify": False}, {"progress": "none"}, {"processor": "x"}],
)
def test_a_setting_of_a_call_does_not_come_with_a_checkpoint(copy, setting):
    name, value = next(iter(setting.items()))
    change_config(copy, **setting)
    for read in (load, read_inventory):
        with pytest.raises(ConfigError, match=f"holds {name}={value!r}, which belongs to a call"):
            read(copy)


def test_a_folder_that_is_not_packed_is_named_by_inspect(tmp_path):
    cases = {
        "nothing": {},
        "list": {"config.json": "[1]"},
        "text part": {"config.json": '{"text_config": "x"}'},
        "settings": {"config.json": '{"quantization_config": ["sab"]}'},
        "no weights": {"config.json": '{"quantization_config": {"quant_method": "sab"}}'},
        "empty weights": {"config.json": '{"quantization_config": {"quant_method": "sab"}}', "model.safetensors": ""},
        "deep": {"config.json": "[" * 100_000},
        "long number": {"config.json": '{"x": ' + "1" * 5000 + "}"},
        "index": {
            "config.json": '{"quantization_config": {"quant_method": "sab"}}',
            "model.safetensors.index.json": '{"weight_map": {"x": "nowhere.safetensors"}}',
        },
    }
    for name, files in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content)
        with pytest.raises(FormatError, match=name if name == "nothing" else None):
            read_inventory(folder)
    binary = tmp_path / "binary"
    binary.mkdir()
    (binary / "config.json").write_bytes(bytes(range(256)))
    for path in (binary, binary / "config.json", tmp_path / "nowhere"):
        with pytest.raises(FormatError, match=r"cannot be read|is no folder"):
            read_inventory(path)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("col_scale", lambda t: t[0]),
        ("row_scale", lambda t: t[0, 0]),
        ("weight", lambda t: t[0]),
        ("col_scale", lambda t: t[:0]),
    ],
)
def test_odd_shapes_are_named_by_inspect(copy, tensor, change):
    def misshape(tensors):
        name = full_name(tensors, f"{LAYER}.{tensor}")
        tensors[name] = change(tensors[name]).clone()

    with pytest.raises(FormatError, match=f"{LAYER}: tensor '{tensor}' is"):
        read_inventory(rewrite(copy, misshape, fresh=True))


def test_a_linear_that_was_dense_stays_unnamed(saved):
    """The head is dense in the checkpoint and in the model: nothing to complain of."""
    assert isinstance(load(saved[1]).lm_head, nn.Linear)
