import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_sab.calibration.allocation import sensitivity
from optimum_sab.calibration.allocation.recomputation import Recomputation
from optimum_sab.calibration.allocation.sensitivity import output_sensitivity, sample_seed
from optimum_sab.calibration.samples.modality import token_modalities
from optimum_sab.calibration.streams.placement import brought
from optimum_sab.errors import CalibrationError, NonFiniteError

NAMES = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)).eval()


def samples(count, length=24):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (1, length), generator=generator)} for _ in range(count)]


@torch.no_grad()
def divergence_under_noise(model, name, inputs, energy, draws):
    """Mean KL per token when the linear's output gets noise of the relative energy given, token by token."""
    generator = torch.Generator().manual_seed(2)
    total = count = 0.0
    for sample in inputs:
        wanted = model(**sample).logits[0].log_softmax(-1)
        for _ in range(draws):

            def disturb(module, args, output):
                noise = torch.randn(output.shape, generator=generator)
                scale = (energy * output.square().mean(-1, keepdim=True)).sqrt()
                return output + scale * noise

            handle = model.get_submodule(name).register_forward_hook(disturb)
            given = model(**sample).logits[0].log_softmax(-1)
            handle.remove()
            total += float(torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="sum"))
            count += wanted.shape[0]
    return total / count


@pytest.mark.parametrize("name", NAMES)
def test_sensitivity_times_the_error_is_the_divergence(llama, name):
    inputs = samples(8)
    found = sum(output_sensitivity(llama, [name], inputs, seed=seed)[name] for seed in range(12)) / 12
    energy = 1e-3
    assert found * energy == pytest.approx(divergence_under_noise(llama, name, inputs, energy, 12), rel=0.15)


def test_sensitivity_repeats_and_leaves_the_model_as_it_was(llama):
    llama.model.norm.weight.requires_grad_(False)
    before = torch.get_rng_state()
    with torch.no_grad():
        first = output_sensitivity(llama, NAMES, samples(2))
    assert first == output_sensitivity(llama, NAMES, samples(2))
    assert first != output_sensitivity(llama, NAMES, samples(2), seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert not llama.model.norm.weight.requires_grad
    assert llama.lm_head.weight.requires_grad
    assert all(p.grad is None for p in llama.parameters())
    assert not any(m._forward_hooks for m in llama.modules())
    llama.model.norm.weight.requires_grad_(True)


@pytest.mark.parametrize("again", [False, True], ids=["at once", "blocks run again"])
def test_the_output_embedding_is_given_the_judged_tokens_alone(build, monkeypatch, again):
    subject = build("qwen2_5_vl")
    model, blocks = subject.model, subject.blocks
    names = [f"model.language_model.layers.{index}.mlp.down_proj" for index in range(2)]
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[-2]))

    def found():
        rows.clear()
        return output_sensitivity(model, names, subject.samples, Recomputation(blocks) if again else None)

    few, judged = found(), list(rows)
    monkeypatch.setattr(sensitivity, "_keep_judged", lambda head, args: None)
    assert few == pytest.approx(found(), rel=1e-5)
    handle.remove()
    texts = [int(token_modalities(sample, model.config).text.sum()) for sample in subject.samples]
    assert judged == texts
    assert rows == [sample["input_ids"].shape[1] for sample in subject.samples] and sum(texts) < sum(rows)


def test_a_model_that_makes_more_of_its_logits_is_judged_by_what_it_gives(build):
    """Each token's logits twice: as many as the output embedding was not given."""
    subject = build("llama")

    class Doubling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = subject.model

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.logits = output.logits.repeat_interleave(2, dim=1)
            return output

    found = output_sensitivity(Doubling(), [f"inner.{NAMES[0]}"], subject.samples)
    assert found[f"inner.{NAMES[0]}"] > 0


def test_every_seed_that_a_run_may_have_is_torchs_and_small_ones_are_as_they_were(llama):
    assert [sample_seed(seed, 3) for seed in (0, 1, 17, 18 * 10**12)] == [
        3,
        1_000_006,
        17_000_054,
        18 * 10**12 * 1_000_003 + 3,
    ]
    largest = 2**64 - 1
    assert len({sample_seed(largest, index) for index in range(100)}) == 100
    found = [output_sensitivity(llama, NAMES[:1], samples(2), seed=seed) for seed in (largest, largest, largest - 1)]
    assert found[0] == found[1] != found[2]


def test_sensitivity_is_the_same_when_blocks_run_again(llama):
    kept = [layer.forward for layer in llama.model.layers]
    plain = output_sensitivity(llama, NAMES, samples(3))
    again = output_sensitivity(llama, NAMES, samples(3), Recomputation(llama.model.layers))
    assert again == pytest.approx(plain, rel=1e-6)
    assert [layer.forward for layer in llama.model.layers] == kept
    assert not any("forward" in vars(layer) for layer in llama.model.layers)


@pytest.mark.parametrize(("room", "runs"), [(0, [3, 3]), (1, [3, 3]), (10**9, [0, 0])])
def test_blocks_that_find_room_do_not_run_again(llama, room, runs):
    calls = [[] for _ in llama.model.layers]
    handles = [
        layer.mlp.register_forward_pre_hook(lambda *args, of=of: of.append(1))
        for layer, of in zip(llama.model.layers, calls)
    ]
    try:
        found = output_sensitivity(llama, NAMES, samples(3), Recomputation(llama.model.layers, room=room))
    finally:
        for handle in handles:
            handle.remove()
    measured = int(room > 0)  # the first block of the first sample shows what one remembers
    assert [len(of) - 3 for of in calls] == [runs[0] - min(measured, runs[0]), runs[1]]
    assert found == output_sensitivity(llama, NAMES, samples(3), Recomputation(llama.model.layers))


def test_room_for_one_block_is_used_for_one(llama):
    layers, kept = llama.model.layers, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage()) or t, lambda t: t):
        output_sensitivity(llama, NAMES, samples(1), None)
    weights = {p.untyped_storage().data_ptr() for p in llama.parameters()}
    sizes = {each.data_ptr(): each.nbytes() for each in kept if each.data_ptr() not in weights}
    ran = []
    handles = [layer.mlp.register_forward_pre_hook(lambda *args, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    try:
        output_sensitivity(llama, NAMES, samples(2), Recomputation(layers, room=sum(sizes.values()) * 2 // 3))
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1, 1] * 2


def test_sensitivity_of_a_model_that_writes_into_its_embeddings(llama):
    class Writing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama

        def get_input_embeddings(self):
            return llama.get_input_embeddings()

        def forward(self, input_ids, **kwargs):
            embedded = self.get_input_embeddings()(input_ids)
            embedded[:, 3:5] = 0.5  # as where a picture's features go
            return self.inner(inputs_embeds=embedded, **kwargs)

    found = output_sensitivity(Writing(), [f"inner.{NAMES[0]}"], samples(2), Recomputation(llama.model.layers))
    assert found[f"inner.{NAMES[0]}"] > 0


def test_sensitivity_keeps_only_what_enters_a_block(llama):
    def saved(blocks):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            output_sensitivity(llama, NAMES, samples(1), Recomputation(blocks))
        return sum(sizes)

    assert saved(llama.model.layers) < 0.5 * saved(())


def test_sensitivity_on_a_device_brings_weights_there_and_leaves_the_model(llama, monkeypatch):
    from optimum_sab.calibration.allocation import recomputation as module

    elsewhere, asked = torch.device("cpu:0"), []  # which is not cpu to PyTorch
    monkeypatch.setattr(module, "brought", lambda *a: asked.append(brought(*a)) or asked[-1])
    found = output_sensitivity(llama, NAMES, samples(2), Recomputation(llama.model.layers, elsewhere))
    assert found == pytest.approx(output_sensitivity(llama, NAMES, samples(2)), rel=1e-6)
    assert all(len(tensors) == len(list(llama.model.layers[0].parameters())) for tensors in asked)
    assert len(asked) == 2 * 2 * 2  # forward and again on the way back, two blocks, two samples


def test_sensitivity_of_a_model_without_logits_is_that_of_its_hidden_states(llama):
    inner = llama.model
    names = [name.removeprefix("model.") for name in NAMES]
    found = output_sensitivity(inner, names, samples(8))
    energy, name = 1e-3, names[1]
    noise, total, count = torch.Generator().manual_seed(2), 0.0, 0
    with torch.no_grad():
        for sample in samples(8):
            wanted = inner(**sample).last_hidden_state[0]
            for _ in range(12):

                def disturb(module, args, output):
                    scale = (energy * output.square().mean(-1, keepdim=True)).sqrt()
                    return output + scale * torch.randn(output.shape, generator=noise)

                handle = inner.get_submodule(name).register_forward_hook(disturb)
                given = inner(**sample).last_hidden_state[0]
                handle.remove()
                total += float(((given - wanted).square().sum(-1) / wanted.square().sum(-1)).sum())
                count += len(wanted)
    mean = sum(output_sensitivity(inner, names, samples(8), seed=s)[name] for s in range(12)) / 12
    assert 2 * mean * energy == pytest.approx(total / count, rel=0.15)
    assert found[name] > 0


def test_sensitivity_refuses_what_it_cannot_measure(llama):
    class Detached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama

        def get_input_embeddings(self):
            return torch.nn.Embedding(2, 2)

        def forward(self, **kwargs):
            output = self.inner(**kwargs)
            output.logits = output.logits.detach().requires_grad_(True)
            return output

    name = f"inner.{NAMES[0]}"
    with pytest.raises(CalibrationError, match="no gradient reaches the linears of Detached"):
        output_sensitivity(Detached(), [name], samples(1))
    weight = llama.lm_head.weight.data
    kept = weight.clone()
    weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        output_sensitivity(llama, NAMES, samples(1))
    weight.copy_(kept)


def test_sensitivity_names_inference_mode(llama):
    with torch.inference_mode(), pytest.raises(CalibrationError, match="outside of it"):
        output_sensitivity(llama, NAMES, samples(1))
