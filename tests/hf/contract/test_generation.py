"""generate with a static cache, which compiles by itself where Transformers thinks it can."""

import pytest
import torch
from transformers import CompileConfig, StaticCache, pipeline

from optimum_sab.hf.compat import CACHE_ARGUMENT, RENAMES
from optimum_sab.hf.quantizer import SABHfQuantizer


@pytest.fixture
def compiled():
    """A configuration that compiles on the CPU too, and the graphs that came of it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    yield config, graphs
    torch._dynamo.reset()


def test_a_static_cache_compiles_by_itself_into_whole_graphs(model, continued, compiled):
    config, graphs = compiled
    expected = continued(model)
    found = continued(model, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    assert graphs
    packed = [node for graph in graphs for node in graph.graph.nodes if "binary_linear" in str(node.target)]
    assert len(packed) == 14 * len(graphs)  # none of the layers breaks the graph or is traced through


def test_it_does_not_where_it_is_not_asked_to(model, continued, compiled, monkeypatch):
    config, graphs = compiled
    assert torch.equal(
        continued(model, cache_implementation="dynamic"), continued(model, cache_implementation="static")
    )
    assert not graphs
    monkeypatch.setattr(SABHfQuantizer, "is_compileable", False)
    continued(model, cache_implementation="static", compile_config=config)
    assert not graphs  # so it is the quantizer that is asked


def test_transformers_criteria_hold_for_a_packed_model(model, compiled):
    config, _ = compiled
    sizes = {"max_cache_len": 8} if RENAMES else {"max_cache_len": 8, "max_batch_size": 1}
    given = {CACHE_ARGUMENT: StaticCache(config=model.config, **sizes)}
    model.generation_config.compile_config = config
    assert model._valid_auto_compile_criteria(given, model.generation_config) is True


def test_a_pipeline_generates_what_generate_does(pair, model):
    generator = pipeline("text-generation", model=str(pair.packed), dtype=torch.float32, device="cpu")
    text = "the red boat"
    settings = {"max_new_tokens": 4, "do_sample": False}
    ids = generator.tokenizer(text, return_tensors="pt").input_ids
    expected = generator.tokenizer.decode(model.generate(ids, **settings)[0], skip_special_tokens=True)
    assert generator(text, **settings)[0]["generated_text"] == expected
