import warnings

import pytest
import torch
from torch import nn

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError, SABWarning
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.selection import replace_with_skeletons, select_linears, warn_of_idle_rules

SMALL = LayerSettings(block_size=32)
PARTS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width, bias=False)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.self_attn = Attention(width)
        self.mlp = Mlp(width)


class Tower(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(count))


class Language(Tower):
    def __init__(self, count, width):
        super().__init__(count, width)
        self.embed_tokens = nn.Embedding(20, width)


class VisionLanguage(nn.Module):
    """Qwen2.5-VL's names: model.visual, model.language_model.layers, a projector, and a tied lm_head."""

    def __init__(self, prefix="language_model", width=16, vision=(4, 64)):
        super().__init__()
        self.model = nn.Module()
        self.model.visual = Tower(*vision)  # larger than the language model on purpose
        self.model.projector = nn.Sequential(nn.Linear(vision[1], width), nn.GELU(), nn.Linear(width, width))
        setattr(self.model, prefix, Language(2, width))
        self.prefix = prefix
        self.lm_head = nn.Linear(width, 20, bias=False)
        self.lm_head.weight = self.get_decoder().embed_tokens.weight

    def get_decoder(self):
        return getattr(self.model, self.prefix)


class Text(nn.Module):
    """A model without vision and without an accessor: model.layers."""

    def __init__(self, width=16):
        super().__init__()
        self.model = Language(3, width)
        self.lm_head = nn.Linear(width, 20, bias=False)


def names(prefix, count):
    return [f"{prefix}.{i}.{part}" for i in range(count) for part in PARTS]


# --- defaults ---


@pytest.mark.parametrize("prefix", ["language_model", "model"])
def test_selection_holds_the_linears_of_the_decoder_blocks_and_nothing_else(prefix):
    """Not the vision tower with its own list of layers, the projector, the embedding or the tied lm_head."""
    model = VisionLanguage(prefix)
    found = select_linears(model, SMALL)
    assert found.lists.names == (f"model.{prefix}.layers",)
    assert list(found.settings) == names(f"model.{prefix}.layers", 2)
    assert set(found.settings.values()) == {SMALL}
    assert found.left_dense == ()


def test_selection_of_a_text_model_holds_its_layers():
    found = select_linears(Text(), SMALL)
    assert list(found.settings) == names("model.layers", 3)


def test_selection_of_a_bare_list_of_blocks_holds_its_linears():
    found = select_linears(Text().model.layers, SMALL)
    assert found.lists.names == ("",)
    assert list(found.settings) == [name.removeprefix("model.layers.") for name in names("model.layers", 3)]


def test_selection_of_a_skeleton_on_meta_is_that_of_the_model():
    with torch.device("meta"):
        skeleton = VisionLanguage()
    assert select_linears(skeleton, SMALL) == select_linears(VisionLanguage(), SMALL)


# --- modules_to_not_convert ---


def test_rules_add_to_the_defaults():
    found = select_linears(VisionLanguage(), SMALL, ["down_proj", r"re:layers\.1\..*o_proj"])
    dense = ["0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.down_proj"]
    assert list(found.left_dense) == [f"model.language_model.layers.{name}" for name in dense]
    assert list(found.settings) == [n for n in names("model.language_model.layers", 2) if n not in found.left_dense]


@pytest.mark.parametrize("rule", ["lm_head", "visual", "projector", "embed_tokens", "re:visual"])
def test_a_rule_for_what_is_dense_anyway_counts_as_matched(rule):
    assert select_linears(VisionLanguage(), SMALL, [rule]) == select_linears(VisionLanguage(), SMALL)


def test_a_rule_for_a_whole_block_covers_its_linears():
    found = select_linears(VisionLanguage(), SMALL, ["language_model.layers.1"])
    assert list(found.left_dense) == names("model.language_model.layers", 2)[4:]


@pytest.mark.parametrize("rule", ["gate_proj", "down", "layers.7", "re:layers[.]7", ""])
def test_a_rule_that_matches_nothing_is_refused_by_name(rule):
    with pytest.raises(ConfigError) as caught:
        select_linears(VisionLanguage(), SMALL, ["o_proj", rule])
    assert repr(rule) in str(caught.value)
    assert "VisionLanguage" in str(caught.value)
    assert "model.language_model.layers.0.self_attn.q_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "meant"),
    [
        ("layer.1", "layers.1"),
        ("o_porj", "o_proj"),
        ("mlp.down_prj", "mlp.down_proj"),
        ("model.language_modle.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_rule_that_was_misspelt_is_told_what_was_meant(rule, meant, dynamic):
    rules = ([], {rule: {"base_planes": 2}}) if dynamic else ([rule], {})
    with pytest.raises(ConfigError) as caught:
        select_linears(VisionLanguage(), SMALL, *rules)
    assert str(caught.value) == f"the module rule {rule!r} matches no module of VisionLanguage; did you mean {meant!r}?"


def test_a_rule_that_matches_nothing_passes_where_rules_are_not_strict():
    found = select_linears(VisionLanguage(), SMALL, ["gate_proj", "o_proj"], {"gate": {"base_planes": 2}}, strict=False)
    assert len(found.left_dense) == 2
    assert set(found.settings.values()) == {SMALL}


def test_a_rule_that_is_no_regular_expression_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"module rule 're:\('"):
        select_linears(VisionLanguage(), SMALL, ["re:("])


@pytest.mark.parametrize("strict", [True, False])
def test_rules_that_leave_nothing_are_refused(strict):
    with pytest.raises(ConfigError, match="VisionLanguage"):
        select_linears(VisionLanguage(), SMALL, ["language_model"], strict=strict)


def idle_rules(rules):
    """What is said of rules, of a model whose tower has parts named as linears of its language model end and begin."""
    model = VisionLanguage()
    for block in model.model.visual.layers:
        block.attn, block.up = nn.Module(), nn.Linear(4, 4)
        block.attn.proj = nn.Linear(4, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_idle_rules(model, select_linears(model, SMALL, rules), rules)
    assert all(each.category is SABWarning for each in told)
    return [str(each.message) for each in told]


def test_a_rule_that_keeps_nothing_dense_and_stands_in_names_of_linears_is_told_once():
    (said,) = idle_rules(["proj", "lm_head", "proj"])
    assert said == (
        "the module rule 'proj' keeps nothing dense that would not be dense without it: it matches modules such as "
        "'model.visual.layers.0.attn.proj', and not 'q_proj', 'o_proj', 'up_proj' and others. Rules are whole dotted "
        "names or parts between dots; if those were meant, write 're:.*proj$', or name them."
    )


@pytest.mark.parametrize(
    ("rule", "missed", "remedy", "then_dense"), [("up", "up_proj", "re:.*up", 2), ("attn", "self_attn", "re:.*attn", 4)]
)
def test_what_an_idle_rule_is_told_to_be_does_what_was_meant(rule, missed, remedy, then_dense):
    (said,) = idle_rules([rule])
    assert f", and not {missed!r}. Rules are" in said and f"write {remedy!r}, or" in said
    assert idle_rules([remedy]) == []
    assert len(select_linears(VisionLanguage(), SMALL, [remedy]).left_dense) == then_dense


@pytest.mark.parametrize(
    "rule", ["lm_head", "visual", "embed_tokens", "norm", "q_proj", "layers.1", "self_attn", "re:attn.proj$"]
)
def test_a_rule_for_what_is_dense_anyway_or_that_keeps_some_dense_is_passed_over(rule):
    assert idle_rules([rule]) == []


# --- dynamic ---


def test_dynamic_overrides_apply_in_their_order():
    dynamic = {
        "down_proj": {"base_planes": 2, "block_size": 64},
        r"layers\.1\.": {"base_planes": 3},
        "q_proj": {"residual_planes": 0},
    }
    found = select_linears(VisionLanguage(), SMALL, dynamic=dynamic).settings
    prefix = "model.language_model.layers"
    assert found[f"{prefix}.0.mlp.down_proj"] == SMALL.replace(base_planes=2, block_size=64)
    assert found[f"{prefix}.1.mlp.down_proj"] == SMALL.replace(base_planes=3, block_size=64)
    assert found[f"{prefix}.0.self_attn.q_proj"] == SMALL.replace(residual_planes=0)
    assert found[f"{prefix}.1.self_attn.q_proj"] == SMALL.replace(base_planes=3, residual_planes=0)
    assert found[f"{prefix}.0.mlp.up_proj"] == SMALL
    backwards = dict(reversed(dynamic.items()))
    turned = select_linears(VisionLanguage(), SMALL, dynamic=backwards).settings
    assert turned[f"{prefix}.1.mlp.down_proj"] == SMALL.replace(base_planes=2, block_size=64)


def test_more_rules_change_the_settings_of_the_same_linears_as_selecting_with_them_does():
    defaults, first, more = SMALL, {"q_proj": {"block_size": 64}}, {r"layers\.1\.": {"base_planes": 2}}
    found = select_linears(VisionLanguage(), defaults, dynamic=first).with_rules(more)
    assert found == select_linears(VisionLanguage(), defaults, dynamic={**first, **more})
    assert found.settings != select_linears(VisionLanguage(), defaults, dynamic=first).settings


def test_a_dynamic_rule_that_matches_nothing_is_refused_by_name():
    with pytest.raises(ConfigError, match="gate_proj"):
        select_linears(VisionLanguage(), SMALL, dynamic={"gate_proj": {"base_planes": 2}})


def test_a_dynamic_rule_for_what_stays_dense_is_refused():
    with pytest.raises(ConfigError, match="visual"):
        select_linears(VisionLanguage(), SMALL, dynamic={"visual": {"base_planes": 2}})


def test_a_dynamic_rule_with_a_bad_setting_is_refused():
    with pytest.raises(ConfigError, match="blocksize"):
        select_linears(VisionLanguage(), SMALL, dynamic={"q_proj": {"blocksize": 64}})


# --- shared and fused weights ---


def test_linears_that_share_a_parameter_stay_dense():
    model = VisionLanguage()
    layers = model.model.language_model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[0].self_attn.o_proj.weight = model.model.visual.layers[0].self_attn.o_proj.weight
    found = select_linears(model, SMALL)
    prefix = "model.language_model.layers"
    assert list(found.left_dense) == [
        f"{prefix}.0.self_attn.o_proj",
        f"{prefix}.0.mlp.up_proj",
        f"{prefix}.1.mlp.up_proj",
    ]
    assert not set(found.left_dense) & set(found.settings)


def test_a_linear_that_stands_in_two_blocks_stays_dense():
    """One module under two names: replacing it under the first would leave the second behind."""
    model = VisionLanguage()
    layers = model.model.language_model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    assert not [name for name in select_linears(model, SMALL).settings if "up_proj" in name]


class Mixture(nn.Module):
    """Qwen2-MoE's names: a router and a shared expert with a gate of its own beside the experts."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(width, 3, bias=False)
        self.experts = nn.ModuleList(Mlp(width) for _ in range(3))
        self.shared_expert = Mlp(width)
        self.shared_expert_gate = nn.Linear(width, 1, bias=False)


def test_where_nothing_is_left_a_rule_for_some_of_it_is_not_what_is_wrong():
    with pytest.raises(ConfigError, match="loosen modules_to_not_convert"):
        select_linears(VisionLanguage(), SMALL, ["language_model"], {"down_proj": {"base_planes": 2}})


@pytest.mark.parametrize("strict", [True, False])
def test_routers_stay_dense_and_experts_do_not(strict):
    model = VisionLanguage()
    model.model.language_model.layers[1].mlp = Mixture(16)
    found = select_linears(model, SMALL, strict=strict)
    start = "model.language_model.layers.1.mlp"
    assert found.left_dense == (f"{start}.gate", f"{start}.shared_expert_gate")
    experts = [f"experts.{i}" for i in range(3)]
    wanted = {f"{start}.{owner}.{name}" for owner in (*experts, "shared_expert") for name in ("up_proj", "down_proj")}
    assert {name for name in found.settings if name.startswith(start)} == wanted


def test_a_packed_model_selects_the_same_names():
    model = VisionLanguage()
    selection = select_linears(model, SMALL, ["o_proj"])
    replace_with_skeletons(model, selection)
    assert select_linears(model, SMALL, ["o_proj"]) == selection


class Scaled(nn.Linear):
    """Computes more than its weight says."""

    def forward(self, x):
        return 2.0 * super().forward(x)


def test_a_linear_with_a_forward_of_its_own_stays_dense():
    model = VisionLanguage()
    up = model.model.language_model.layers[0].mlp.up_proj
    model.model.language_model.layers[0].mlp.up_proj = Scaled(up.in_features, up.out_features)
    found = select_linears(model, SMALL)
    assert found.left_dense == ("model.language_model.layers.0.mlp.up_proj",)
    assert "model.language_model.layers.1.mlp.up_proj" in found.settings


def test_a_model_without_decoder_blocks_is_refused():
    with pytest.raises(ConfigError, match="Sequential"):
        select_linears(nn.Sequential(nn.Linear(4, 4)), SMALL)


# --- replacing ---


def test_set_module_replaces_a_module_at_any_depth():
    model = VisionLanguage()
    for name in ("lm_head", "model.language_model.layers.1.mlp.up_proj"):
        new = nn.Identity()
        set_module(model, name, new)
        assert model.get_submodule(name) is new


def test_replace_with_skeletons_swaps_the_selected_linears_only():
    with torch.device("meta"):
        model = VisionLanguage().to(torch.bfloat16)
    settings = {"down_proj": {"base_planes": 2}}
    selection = select_linears(model, SMALL, ["o_proj"], settings)
    replace_with_skeletons(model, selection)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, SABLinear)}
    assert list(packed) == list(selection.settings)
    for name, layer in packed.items():
        assert layer.settings == selection.settings[name]
        assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
        assert (layer.bias is not None) == name.endswith("q_proj")
        assert layer.bias is None or layer.bias.dtype == torch.bfloat16
    down = packed["model.language_model.layers.0.mlp.down_proj"]
    assert (down.in_features, down.out_features) == (32, 16)


def test_what_will_be_tied_when_it_is_loaded_is_shared_before():
    """Transformers 5 says so of a model on meta; DiffusionGemma's encoder has its decoder's weights."""
    model = VisionLanguage()
    start = "model.language_model.layers"
    model.all_tied_weights_keys = {f"{start}.1.mlp.up_proj.weight": f"{start}.0.mlp.up_proj.weight"}
    found = select_linears(model, SMALL)
    assert found.left_dense == (f"{start}.0.mlp.up_proj", f"{start}.1.mlp.up_proj")


def test_a_model_whose_linears_are_all_tied_is_refused_by_that_name():
    model = VisionLanguage()
    first, second = (f"model.language_model.layers.{i}" for i in range(2))
    model.all_tied_weights_keys = {f"{second}.{part}.weight": f"{first}.{part}.weight" for part in PARTS}
    with pytest.raises(ConfigError, match="nothing can be binarized in VisionLanguage: the weights of all its linears"):
        select_linears(model, SMALL)
