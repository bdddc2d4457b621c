"""What the tests do on the CPU and on the simulated accelerator, each in a process of its own."""

import copy
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.calibration.options import AllocationSettings, RunOptions
from optimum_sab.calibration.pipeline import binarize
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.random_weight import random_packed
from optimum_sab.hf.selection import select
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import select_linears
from optimum_sab.nn.unfusing import unfuse_experts
from optimum_sab.ops import backends
from optimum_sab.ops.verification import disagreement
from tests.accelerator.simulated import installed
from tests.calibration.conftest import TEXT, build
from tests.calibration.rank_work import texts

QUICK = LayerSettings(block_size=32, salient_fraction=0.125, iterations=2, sweeps=1)
PLAIN = QUICK.replace(block_size=128, base_planes=2, iterations=1)
KINDS = {
    "default": QUICK,
    "paper": QUICK.replace(significance="modality", feedback="block", refit=False, sweeps=0, row_scale="fp16"),
    "coded": PLAIN.replace(code="trellis16x2"),
    "partly coded": PLAIN,
}
# a search is thousands of operations, each of which goes through Python here
RULES = {"partly coded": {r"layers\.(0\.self_attn\.o_proj|1\.mlp\.down_proj)": {"code": "trellis16x2"}}}


def family(name, settings="default", refine=False):
    """(stored tensors on the CPU, report) of a family's small model, on the CPU and on the accelerator."""

    def on(device):
        subject = build(name)
        if name == "llama":
            subject.samples = texts(60, 50, 40)  # more than features, so that rounding stays small
        options = RunOptions(
            device=device,
            allocation=None if refine else AllocationSettings(),
            refine=RefineSettings(epochs=1, steps=2) if refine else None,
        )
        selection = select_linears(subject.model, KINDS[settings], dynamic=RULES.get(settings))
        report = binarize(subject.model, selection, subject.samples, options)
        return stored(subject.model), report

    return both(on)


def mixture():
    """The same of a Mixtral, whose experts are solved as stacks on an accelerator."""

    def on(device):
        torch.manual_seed(0)
        config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
        model = transformers.MixtralForCausalLM(config).eval()
        selection = select(model, SABConfig(block_size=32, iterations=2, sweeps=0), strict=True)
        unfuse_experts(model, selection.experts)
        options = RunOptions(device=device, allocation=AllocationSettings(), temperature_scaling=False)
        report = binarize(model, selection, texts(40, 30, 50, 20), options)
        return stored(model), report

    return both(on)


def loaded_with(example, settings):
    """The same of `from_pretrained`."""

    def on(device):
        name = None if device is None else str(device)
        config = SABConfig(
            calibration_samples=6,
            sequence_length=32,
            iterations=2,
            sweeps=0,
            progress="none",
            calibration_device=name,
            **settings,
        )
        model = AutoModelForVision2Seq.from_pretrained(str(example), quantization_config=config)
        return stored(model), None

    return both(on)


def both(on):
    warnings.simplefilter("ignore")
    first = on(None)
    with installed() as device:
        return first, on(device)


def stored(model):
    assert {each.device.type for each in model.state_dict().values()} == {"cpu"}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def kernels(settings):
    """Triton kernels, interpreted, on a layer there: errors against the CPU of outputs, gradients and weight."""
    backends._triton_problem = lambda device: None  # which refuses the kind of device, and compares, as is done here
    layer = SABLinear.from_packed(random_packed(96, 544, settings), None)
    x = torch.randn(2, 3, 544, generator=torch.Generator().manual_seed(0))
    with installed() as device:
        assert disagreement(device) is None
        moved = copy.deepcopy(layer).to(device)
        assert {each.device.type for each in moved.state_dict().values()} == {device.type}
        found = []
        for module, place in ((layer, "cpu"), (moved, device)):
            inputs = x.clone().to(place).requires_grad_()
            output = module(inputs)
            output.square().sum().backward()
            found.append([each.detach().cpu() for each in (output, inputs.grad, module.packed.dequantize())])
    return [float((mine - own).abs().max() / own.abs().max()) for own, mine in zip(*found, strict=True)]


def packed_model(example):
    """A packed checkpoint moved there: tokens on either device, and whether what is saved from there is the same.

    A parameter that is tied comes apart on its way to tensors that wrap others, so one name more is saved.
    """
    warnings.simplefilter("ignore")
    backends._triton_problem = lambda device: None
    folder = Path(tempfile.mkdtemp())
    config = SABConfig(
        calibration_samples=4, sequence_length=32, iterations=2, sweeps=0, allocation="uniform", progress="none"
    )
    model = AutoModelForVision2Seq.from_pretrained(str(example), quantization_config=config)
    ids = torch.tensor([[1, 5, 6, 7]])
    tokens = [model.generate(ids, max_new_tokens=3, do_sample=False).tolist()]
    model.save_pretrained(folder / "before")
    with installed() as device:
        model.to(device)
        tokens.append(model.generate(ids.to(device), max_new_tokens=3, do_sample=False).tolist())
        model.save_pretrained(folder / "after")
    before, after = (load_file(folder / each / "model.safetensors") for each in ("before", "after"))
    return tokens, all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def mixing():
    """What is raised where a tensor of the CPU comes to one of the accelerator, or NumPy is to see one."""
    found = []
    with installed() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        assert (there + torch.tensor(2.0)).cpu().tolist() == [3.0] * 3  # a number may come from anywhere
        for mistake in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there.numpy()):
            try:
                mistake()
                found.append(None)
            except (RuntimeError, TypeError) as error:
                found.append(str(error))
    return found
