"""Packed models computed by the Triton kernels, interpreted where there is no GPU, under every line of Transformers."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from optimum_sab import SABConfig, SABLinear
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.hf.compat import CACHE_ARGUMENT
from optimum_sab.nn.input_group import SHARED
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.selection import select_linears
from optimum_sab.ops import force_backend
from optimum_sab.ops.shape import LayerShape
from optimum_sab.ops.verification import sample_weight

sab_kernels = pytest.importorskip("sab_kernels", exc_type=ImportError)


FIVE = int(transformers.__version__.split(".")[0]) >= 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# An interpreted launch costs as much as it has tiles of 32 rows, and what is grouped has whole ones.
HIDDEN, MIDDLE, HEADS, KEY_HEADS, HEAD = 32, 32, 2, 1, 32
SETTINGS = LayerSettings(block_size=64)
INPUT = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 3, "up_proj": 3, "down_proj": 4}
GROUPS = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]  # of a block
LAUNCHES = [(64, 32, 32), (32, 32)]


def save_packed_llama(path, blocks):
    """A packed Llama of random bits, whose siblings have equal columns as the solver makes them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for name in select_linears(model, SETTINGS).settings:
        dense = model.get_submodule(name)
        packed = sample_weight(SETTINGS, dense.out_features, dense.in_features)
        columns = sample_weight(SETTINGS, INPUT[name.rpartition(".")[2]], dense.in_features)  # other rows, other bits
        packed.tensors.update({key: columns.tensors[key] for key in SHARED})
        bias = None if dense.bias is None else torch.randn(dense.out_features)
        set_module(model, name, SABLinear.from_packed(packed, bias))
    model.save_pretrained(path)
    stored = json.loads((path / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "sab", "block_size": 64, "format_version": 1}
    (path / "config.json").write_text(json.dumps(stored))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One block is enough for most."""
    return save_packed_llama(tmp_path_factory.mktemp("packed"), 1)


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    return save_packed_llama(tmp_path_factory.mktemp("two-blocks"), 2)


def load(folder, backend=None, **settings):
    """The model, with its layers prepared for this backend, which also computes later on.

    Transformers 4.57 cannot be told in the call: it is forced there, and the layers are told afterwards.
    """
    if FIVE and backend is not None:
        settings["quantization_config"] = SABConfig(backend=backend)
    if DEVICE == "cuda" and backend == "triton":
        settings["device_map"] = DEVICE
    with nullcontext() if FIVE else force_backend(backend):
        model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **settings})
    for layer in linears(model).values():
        assert layer.backend == (backend if FIVE else None)
        layer.backend = backend
    return model


@pytest.fixture(scope="module")
def shared_model(folder):
    """Loaded once, for tests that leave it as it is."""
    return load(folder, "triton")


@pytest.fixture(scope="module")
def shared_logits(shared_model, tokens):
    """Of the tokens; members' tensors are views of stacked ones from here on."""
    return logits(shared_model, tokens)


@pytest.fixture
def model(folder):
    return load(folder, "triton")


@pytest.fixture(scope="module")
def tokens():
    return torch.arange(5, 14)[None]


@pytest.fixture(scope="module")
def reference(folder, tokens):
    with torch.no_grad():
        return load(folder, "reference")(input_ids=tokens).logits


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens.to(model.lm_head.weight.device)).logits.float().cpu()


def assert_near(found, expected, tolerance=1e-4):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SABLinear)}


def groups(model):
    """Names of the members of every group, in the model's order."""
    found, names = {}, {m: name.rpartition(".")[2] for name, m in linears(model).items()}
    for layer in names:
        if layer.group is not None:
            found[id(layer.group)] = tuple(names[member] for member in layer.group.members)
    return list(found.values())


@pytest.fixture
def launches(monkeypatch):
    """Layer sizes of every launch of several layers."""
    seen, real = [], sab_kernels.stacked_linear

    def count(x, tensors, geometry, sizes, *rest):
        seen.append(tuple(sizes))
        return real(x, tensors, geometry, sizes, *rest)

    monkeypatch.setattr(sab_kernels, "stacked_linear", count)
    return seen


# -- loading and computing ---------------------------------------------------------------------------------------------


def test_loaded_layers_are_in_the_kernel_layout_and_grouped_by_block(two_blocks):
    model = load(two_blocks, "triton")
    assert {m.layout for m in linears(model).values()} == {"kernel"}
    assert len(linears(model)) == 7 * 2
    assert groups(model) == GROUPS * 2


def test_layers_of_another_backend_stay_as_stored(folder):
    for backend in ("reference", "cpu") if DEVICE == "cpu" else ("reference",):
        assert {m.layout for m in linears(load(folder, backend)).values()} == {"stored"}


def test_logits_are_those_of_the_reference(shared_model, reference, tokens, launches):
    for _ in range(2):
        assert_near(logits(shared_model, tokens), reference)
    assert launches == LAUNCHES * 2


def test_logits_of_the_cpu_kernels_are_those_of_the_reference(folder, reference, tokens):
    with force_backend("cpu"):
        assert_near(logits(load(folder, device_map=None), tokens), reference)


def test_logits_in_half_precision_are_near_the_reference(folder, tokens):
    found = logits(load(folder, "triton", dtype=torch.float16), tokens)
    assert_near(found, logits(load(folder, "reference", dtype=torch.float16), tokens), 0.02)


def test_padded_batch_gives_the_logits_of_its_rows(shared_model, shared_logits, tokens):
    short = tokens[:, :5]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], -1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(short)], -1)
    batch, masks = torch.cat([tokens, padded]).to(DEVICE), torch.cat([torch.ones_like(tokens), mask]).to(DEVICE)
    with torch.no_grad():
        found = shared_model(input_ids=batch, attention_mask=masks).logits.cpu()
    assert_near(found[:1], shared_logits)
    assert_near(found[1:, 4:], logits(shared_model, short))


def test_generate_gives_the_tokens_of_the_reference(folder, shared_model, tokens):
    settings = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    expected = load(folder, "reference").generate(tokens, **settings)
    assert torch.equal(shared_model.generate(tokens.to(DEVICE), **settings).cpu(), expected)


def test_gradients_reach_the_embeddings_as_through_the_reference(folder, shared_model, tokens):
    found = []
    for model in (shared_model, load(folder, "reference")):
        embeddings = model.get_input_embeddings()(tokens.to(model.device)).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.square().mean().backward()
        found.append(embeddings.grad.cpu())
    assert_near(found[0], found[1])


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_compiled_decode_step_with_a_static_cache_is_one_graph(folder, reference, tokens, backend):
    if backend == "cpu" and DEVICE == "cuda":
        pytest.skip("the model is on the GPU")
    model = load(folder, backend)
    device = model.lm_head.weight.device
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    if FIVE:
        cache = StaticCache(config=model.config, max_cache_len=16)
    else:
        cache = StaticCache(config=model.config, max_batch_size=1, max_cache_len=16, device=device, dtype=torch.float32)
    prefix = tokens.shape[1] - 3
    with torch.no_grad():
        start = torch.arange(prefix, device=device)
        model(input_ids=tokens[:, :prefix].to(device), cache_position=start, **{CACHE_ARGUMENT: cache})
        for position in range(prefix, tokens.shape[1]):
            where = torch.tensor([position], device=device)
            token = tokens[:, position : position + 1].to(device)
            out = step(input_ids=token, cache_position=where, **{CACHE_ARGUMENT: cache})
            assert_near(out.logits[:, -1].cpu(), reference[:, position])
    assert counter.frame_count <= 2  # the second where the cache's own bookkeeping becomes dynamic


def test_prepared_model_computes_with_another_backend_where_that_is_forced(folder, reference, tokens, launches):
    with force_backend("triton"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
        assert groups(model) == GROUPS
        logits(model, tokens)
    launches.clear()
    with force_backend("reference"):
        assert_near(logits(model, tokens), reference)
    assert launches == []
    with force_backend("triton"):
        assert_near(logits(model, tokens), reference)
    assert launches == LAUNCHES


# -- saving ------------------------------------------------------------------------------------------------------------


def test_save_from_the_kernel_layout_writes_the_stored_tensors(shared_model, shared_logits, folder, tokens, tmp_path):
    shared_model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    assert {m.layout for m in linears(shared_model).values()} == {"kernel"}
    reloaded = load(tmp_path, "triton")
    assert torch.equal(logits(reloaded, tokens), shared_logits)
    assert groups(reloaded) == GROUPS


def test_saved_config_does_not_hold_the_backend(shared_model, tmp_path):
    shared_model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["quantization_config"]["quant_method"] == "sab"
    assert "backend" not in text and "triton" not in text and "layout" not in text


def test_state_dict_of_a_prepared_model_loads_into_a_stored_one(shared_model, folder, reference, tokens):
    other = load(folder, "reference")
    with torch.no_grad():
        for layer in linears(other).values():
            layer.weight.zero_()
    other.load_state_dict(shared_model.state_dict())
    assert torch.equal(logits(other, tokens), reference)


def test_sharded_save_from_the_kernel_layout_reloads_identically(shared_model, shared_logits, tokens, tmp_path):
    shared_model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path, "triton"), tokens), shared_logits)


# -- the model is changed ----------------------------------------------------------------------------------------------


def test_dequantize_from_the_kernel_layout(model, reference, tokens):
    logits(model, tokens)
    model.dequantize()
    assert not linears(model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert_near(logits(model, tokens), reference)


def test_casting_keeps_the_packed_bits(model, folder):
    stored = load_file(folder / "model.safetensors")
    model.to(torch.bfloat16)
    for name, layer in linears(model).items():
        assert layer.layout == "kernel"
        for key, tensor in layer.packed.tensors.items():
            assert torch.equal(tensor.cpu(), stored[f"{name}.{key}"]), (name, key)
        assert layer.bias is None or layer.bias.dtype == torch.bfloat16


def test_casting_to_half_and_back_computes_and_is_stacked_anew(model, reference, tokens, launches):
    half = logits(model.to(torch.float16), tokens)
    back = logits(model.to(torch.float32), tokens)
    assert half.isfinite().all()
    assert_near(back, reference, 0.01)  # biases and embeddings were rounded
    assert launches == LAUNCHES * 2
    assert groups(model) == GROUPS


def test_copied_model_computes_the_same_and_is_grouped(shared_model, shared_logits, tokens, launches):
    twin = copy.deepcopy(shared_model)
    assert torch.equal(logits(twin, tokens), shared_logits)
    assert launches == LAUNCHES
    assert groups(twin) == GROUPS


def test_footprint_in_the_kernel_layout_is_the_kernels_and_no_more(folder, shared_model, tokens):
    """Nothing is held twice, before or after layers are stacked.

    Tiles of 32 × 128 pad this model's layers to several times their signs, and columns are held as int32.
    """
    stored = load(folder, "reference")
    padding = sum(
        sab_kernels.kernel_bytes(layer.shape.geometry) - layer.packed.stored_bytes for layer in linears(stored).values()
    )
    for _ in range(2):
        assert shared_model.get_memory_footprint() - stored.get_memory_footprint() == padding
        stacks = [t for m in linears(shared_model).values() if m.group is not None for t in m.group._stack]
        held = (t.untyped_storage() for t in (*shared_model.parameters(), *stacks))
        storages = {storage.data_ptr(): storage.nbytes() for storage in held}
        assert sum(storages.values()) == sum(t.nbytes for t in shared_model.parameters())
        logits(shared_model, tokens)


@pytest.mark.parametrize(("out_features", "in_features"), [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336)])
def test_footprint_of_layers_of_a_real_model_is_that_of_the_stored_tensors(out_features, in_features):
    settings = LayerSettings()
    stored = SABLinear(in_features, out_features, settings, bias=False, device="meta").bits_per_weight / 8
    kernel = sab_kernels.kernel_bytes(LayerShape.of(out_features, in_features, settings).geometry)
    assert kernel <= 1.05 * stored * out_features * in_features


# -- load-time options -------------------------------------------------------------------------------------------------


def test_backend_is_a_load_time_option_that_leaves_the_stored_settings(folder):
    with pytest.warns(UserWarning, match="backend"):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=SABConfig(backend="reference"))
    assert {m.backend for m in linears(model).values()} == {"reference"}
    assert model.config.quantization_config.block_size == 64


def test_backend_from_the_environment_prepares_the_layers(folder, monkeypatch, reference, tokens):
    if DEVICE == "cuda":
        pytest.skip("the model is on the CPU")
    monkeypatch.setenv("OPTIMUM_SAB_BACKEND", "triton")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert groups(model) == GROUPS
    assert_near(logits(model, tokens), reference)


def test_backend_that_cannot_be_used_is_named_when_loading(folder, monkeypatch):
    with pytest.raises(ConfigError, match="'gpu' is no backend"):
        SABConfig(backend="gpu")
    monkeypatch.setenv("OPTIMUM_SAB_BACKEND", "gpu")
    with pytest.raises(ConfigError, match=r"OPTIMUM_SAB_BACKEND='gpu' is no backend"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.skipif(not FIVE, reason="4.57 refuses disk")
def test_disk_offloaded_blocks_stay_as_stored_and_the_rest_is_prepared(two_blocks, tokens, tmp_path):
    pytest.importorskip("accelerate")
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    device_map = {**dict.fromkeys(names, DEVICE), "model.layers.1": "disk"}
    settings = {
        "device_map": device_map,
        "offload_folder": tmp_path,
        "quantization_config": SABConfig(backend="triton"),
    }
    model = AutoModelForCausalLM.from_pretrained(two_blocks, dtype=torch.float32, **settings)
    layouts = {name: m.layout for name, m in linears(model).items()}
    assert {layout for name, layout in layouts.items() if "layers.1." in name} == {"stored"}
    assert {layout for name, layout in layouts.items() if "layers.0." in name} == {"kernel"}
    assert groups(model) == GROUPS
    reference = logits(load(two_blocks, "reference"), tokens)
    for _ in range(2):
        assert_near(logits(model, tokens), reference)
