"""Where bits and bytes are counted."""

import pytest
import torch

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.progress import no_step
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stages.sizes import MeasureSizes
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.random_weight import random_packed
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.selection import select_linears

PLAIN = LayerSettings(block_size=32)
MORE = {"down_proj": {"base_planes": 2, "residual_planes": 0}}


@pytest.fixture
def run(build):
    """Of a model whose linears are packed, with random content."""

    def make(family, dtype=torch.float32):
        model = build(family).model.to(dtype)
        run = Run(model, select_linears(model, PLAIN, (), MORE), RunOptions())
        for name, settings in run.selection.settings.items():
            dense = model.get_submodule(name)
            packed = random_packed(dense.out_features, dense.in_features, settings)
            set_module(model, name, SABLinear.from_packed(packed, dense.bias))
        return run

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_parameters(run, build, family, dtype):
    work = run(family, dtype)
    before = sum(p.numel() * p.element_size() for p in build(family).model.to(dtype).parameters())
    sizes = MeasureSizes().apply(work, no_step)
    layers = [m for m in work.model.modules() if isinstance(m, SABLinear)]
    packed = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    assert sizes.packed_bytes == packed == sum(each.bytes for each in sizes.kinds.values())
    assert sizes.packed_bytes == sum(each.bytes for each in sizes.planes.values())
    assert sizes.total_bytes == sum(p.numel() * p.element_size() for p in work.model.parameters())
    assert sizes.total_before == before
    assert sizes.bits_per_weight == pytest.approx(
        8 * packed / sum(layer.in_features * layer.out_features for layer in layers)
    )


def test_linears_are_counted_by_kind_and_by_planes(run):
    sizes = MeasureSizes().apply(run("llama"), no_step)
    assert {name: each.linears for name, each in sizes.kinds.items()} == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 2
    )
    assert sizes.kinds["down_proj"].weights == 2 * 96 * 64
    assert {name: each.linears for name, each in sizes.planes.items()} == {
        "1 + 1 on 18.75 %": 12,
        "2": 2,
    }
    assert set(sizes.tensors) == {
        "weight",
        "residual_sign",
        "residual_index",
        "row_scale",
        "row_exponent",
        "col_scale",
        "bias",
    }


def test_what_stays_dense_is_told_by_its_place(run):
    work = run("qwen2_5_vl")
    dense = MeasureSizes().apply(work, no_step).dense
    assert dense["token embedding"] == dense["output embedding"] == 64 * 64 * 4
    assert {"model.visual", "model.language_model", "decoder blocks: norms and what stays dense"} <= set(dense)
    assert list(dense.values()) == sorted(dense.values(), reverse=True)


def test_an_embedding_that_is_also_the_outputs_counts_once(run):
    work = run("llama")
    work.model.lm_head.weight = work.model.get_input_embeddings().weight
    dense = MeasureSizes().apply(work, no_step).dense
    assert dense["token embedding, also the output's"] == 64 * 64 * 4
    assert "output embedding" not in dense
