"""Random packed checkpoints of small models, experts included."""

from optimum_sab.bench.random_layers import random_linear
from optimum_sab.hf.quantizer import SABHfQuantizer
from optimum_sab.hf.selection import EXPERTS, select
from optimum_sab.nn.input_group import SHARED
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.unfusing import unfuse_experts


def pack(model, config):
    """Give a dense model random packed layers, as the quantizer leaves them."""
    selection = select(model, config, strict=True)
    unfuse_experts(model, selection.experts)
    for seed, (name, settings) in enumerate(selection.settings.items()):
        dense = model.get_submodule(name)
        shape = (dense.out_features, dense.in_features)
        set_module(model, name, random_linear(*shape, settings, seed, "cpu", dense.bias))
    for block in model.modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            linears = [linear for each in names if isinstance(linear := getattr(block, each, None), SABLinear)]
            for linear in linears[1:]:  # what the solver gives to all that share an input
                for tensor in SHARED:
                    if tensor in linear._parameters:
                        linear._parameters[tensor].copy_(linears[0]._parameters[tensor])
    if selection.experts:
        config.measured = {EXPERTS: [selection.lists.short(name) for name in selection.experts]}
    model.hf_quantizer = SABHfQuantizer(config)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    return model.eval()
