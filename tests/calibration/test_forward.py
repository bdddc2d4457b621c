"""What the dense model does with its linears decides which of them can be packed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from optimum_sab.calibration.options import AllocationSettings, RunOptions
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.stage import run_stages
from optimum_sab.calibration.stages.allocation import AllocateBits, MeasureSensitivities
from optimum_sab.calibration.stages.blocks import SolveBlocks
from optimum_sab.calibration.stages.forward import LookAtForwards, one_of_each_kind
from optimum_sab.calibration.stages.head import FindHead
from optimum_sab.calibration.stages.rehearsal import RehearseForward
from optimum_sab.calibration.stages.samples import GivenSamples
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError, ConfigError, SABWarning
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import select_linears

SETTINGS = LayerSettings(block_size=32, iterations=2)
IGNORE_FEW = pytest.mark.filterwarnings("ignore:.*calibration tokens are fewer:optimum_sab.errors.SABWarning")
pytestmark = IGNORE_FEW


class Block(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("seen", torch.zeros(1))
        self.way = way

    def forward(self, x):
        if self.training:
            self.seen += 1
            if self.way == "clamps":
                self.down_proj.weight.data.clamp_(-0.01, 0.01)
        if self.way == "dtype":  # as T5, glm5_next and others do
            x = x.to(self.up_proj.weight.dtype)
        hidden = self.up_proj(x).relu()
        if self.way == "twice":
            return x + self.down_proj(hidden) + self.down_proj(hidden * 0.5)
        return x + (0.0 if self.way == "leaves" else self.down_proj(hidden))


class Tiny(nn.Module):
    """A language model of blocks; ``route`` says in which order a sample with and one without a picture takes them."""

    def __init__(self, *ways, route=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Block(way) for way in ways)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 50)
        self.route = route or {True: range(len(ways)), False: range(len(ways))}

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, picture=None, use_cache=False):
        x = self.embedding(input_ids)
        for index in self.route[picture is not None]:
            x = self.layers[index](x)
        return Output(self.head(self.norm(x)))


class Output(tuple):
    def __new__(cls, logits):
        made = super().__new__(cls, (logits,))
        made.logits = logits
        return made


def samples(pictures=2, texts=3):
    ids = [torch.arange(5 + n)[None] for n in range(pictures + texts)]
    return [{"input_ids": each, **({"picture": torch.ones(1)} if n < pictures else {})} for n, each in enumerate(ids)]


class Pictured(GivenSamples):
    """Samples with a picture have a first token that is visual."""

    def apply(self, run, on_step):
        super().apply(run, on_step)
        given = run.samples.inputs
        labels = [torch.tensor([int("picture" in each), *[0] * (each["input_ids"].numel() - 1)]) for each in given]
        run.keep(CalibrationSamples(given, [TokenModalities(("text", "visual"), each) for each in labels]))


def looked_at(model, *more, given=None, **options):
    run = Run(model, select_linears(model, SETTINGS), RunOptions(**options))
    report = run_stages(run, (Pictured(given or samples()), LookAtForwards(), RehearseForward(), *more))
    return run, report


def test_a_model_that_only_calls_its_linears_is_left_alone():
    model = Tiny("", "")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    run, report = looked_at(model)
    assert run.selection == select_linears(model, SETTINGS)
    assert report.section("forward") is None
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())  # buffers too


@pytest.mark.parametrize(
    ("way", "part", "reason"),
    [
        ("dtype", "up_proj", "reads their weight"),
        ("clamps", "down_proj", "reads their weight"),
        ("twice", "down_proj", "more than once in one forward"),
    ],
)
def test_what_one_block_does_to_a_linear_keeps_it_dense_in_all(way, part, reason):
    model = Tiny("", way, "")
    with pytest.warns(SABWarning, match=rf"50\.0% of .*3 linears, such as layers\.0\.{part}: .*{reason}"):
        run, report = looked_at(model, FindHead(), SolveBlocks())
    assert run.selection.left_dense == tuple(f"layers.{i}.{part}" for i in range(3))
    packed = {name for name, module in model.named_modules() if isinstance(module, SABLinear)}
    other = {"up_proj": "down_proj", "down_proj": "up_proj"}[part]
    assert packed == {f"layers.{i}.{other}" for i in range(3)}
    assert list(report.section("forward").values()) == [list(run.selection.left_dense)]
    assert torch.isfinite(model(torch.arange(4)[None]).logits).all()


def test_a_linear_that_no_sample_comes_to_stays_dense_where_that_is():
    with pytest.warns(SABWarning, match=r"1 linear, such as layers\.1\.down_proj: no calibration sample comes"):
        run, _ = looked_at(Tiny("", "leaves"))
    assert run.selection.left_dense == ("layers.1.down_proj",)


def test_a_block_that_only_pictures_come_to_is_binarized_with_them():
    model = Tiny("", "", "", route={True: (0, 1, 2), False: (0, 2)})  # mllama's cross-attention blocks
    run, report = looked_at(model, FindHead(), SolveBlocks())
    assert run.selection.left_dense == ()
    assert [block.index for block in report.blocks] == [0, 1, 2]
    assert all(isinstance(model.layers[i].up_proj, SABLinear) for i in range(3))


def test_a_block_that_nothing_comes_to_stays_dense():
    model = Tiny("", "", "", route={True: (0, 2), False: (0, 2)})
    with pytest.warns(SABWarning, match="no calibration sample comes to them"):
        run, _ = looked_at(model, FindHead(), SolveBlocks())
    assert run.selection.left_dense == ("layers.1.up_proj", "layers.1.down_proj")
    assert isinstance(model.layers[1].up_proj, nn.Linear) and isinstance(model.layers[2].up_proj, SABLinear)


def test_blocks_are_binarized_in_the_order_in_which_they_are_called():
    model = Tiny("", "", "", route={True: (2, 0, 1), False: (2, 1)})
    run, report = looked_at(model, FindHead(), SolveBlocks())
    assert run.selection.blocks == ("layers.2", "layers.0", "layers.1")
    assert [block.layers[0].name for block in report.blocks] == [f"layers.{i}.up_proj" for i in (2, 0, 1)]


def test_a_block_that_is_called_again_is_refused_before_the_work():
    with pytest.raises(CalibrationError, match=r"decoder block layers\.0 more than once"):
        looked_at(Tiny("", "", route={True: (0, 1), False: (0, 1, 0)}))


def test_nothing_left_to_binarize_is_refused():
    with pytest.raises(CalibrationError, match=r"nothing is left to binarize in Tiny.*no calibration sample"):
        looked_at(Tiny("", route={True: (), False: ()}))


def test_one_sample_of_each_kind_is_looked_at_the_shortest_of_it():
    def modalities(*labels):
        return TokenModalities(("text", "visual", "audio"), torch.tensor(labels))

    given = [modalities(0, 0, 0), modalities(0, 1, 1, 1), modalities(0, 1), modalities(0), modalities(0, 1, 2, 2)]
    assert one_of_each_kind(CalibrationSamples([{}] * 5, given)) == [4, 2, 3]


# --- stages that step aside ---


class NoGradient(Tiny):
    """Its predictions cannot be differentiated."""

    def forward(self, input_ids, **arguments):
        output = super().forward(input_ids, **arguments)
        return Output(output.logits.detach())


ALLOCATION = (MeasureSensitivities(), AllocateBits())


def test_allocation_that_cannot_be_measured_leaves_every_linear_its_bits():
    model = NoGradient("", "")
    with pytest.warns(
        SABWarning, match="cannot be measured which linears of NoGradient need more bits, so every linear"
    ):
        run, report = looked_at(model, *ALLOCATION, allocation=AllocationSettings())
    assert set(run.selection.settings.values()) == {SETTINGS}
    assert report.section("allocation") is None


def test_a_wanted_size_is_kept_without_sensitivities():
    model = NoGradient("", "")
    with pytest.warns(SABWarning, match="so all are taken to be equally sensitive"):
        _, report = looked_at(model, *ALLOCATION, allocation=AllocationSettings(target_bits=2.6))
    assert 2.3 < report.section("allocation").choice.bits_per_weight <= 2.6


def test_inference_mode_is_refused_before_any_stage():
    model = Tiny("")
    with torch.inference_mode(), pytest.raises(CalibrationError, match="inference_mode"):
        looked_at(model, *ALLOCATION, allocation=AllocationSettings())


class NeedsPicture(Tiny):
    def forward(self, input_ids, picture=None, use_cache=False):
        if picture is None:
            raise ValueError("exactly one of pictures")
        return super().forward(input_ids, picture)


def test_temperature_is_fitted_by_a_sample_where_a_single_token_is_not_read():
    from optimum_sab.calibration.stages.head import Head

    model = NeedsPicture("", "")
    run, _ = looked_at(model, FindHead(), given=samples(3, 0))
    assert run.kept(Head).last_norm.module is model.norm


def test_temperature_is_left_alone_with_a_word_where_there_is_no_norm():
    from optimum_sab.calibration.stages.head import Head

    model = Tiny("", "")
    model.norm = nn.Identity()
    with pytest.warns(SABWarning, match="temperature of Tiny's predictions is not fitted: no norm"):
        run, _ = looked_at(model, FindHead())
    assert run.kept(Head).last_norm is None


def test_a_wanted_size_out_of_reach_is_still_an_error():
    with pytest.raises(ConfigError, match=r"target_bits=0\.1"):
        looked_at(Tiny("", ""), *ALLOCATION, allocation=AllocationSettings(target_bits=0.1))


# --- before a weight is read ---


def test_a_model_without_a_forward_is_refused_and_its_parts_are_named():
    class Omni(nn.Module):
        def __init__(self):
            super().__init__()
            self.thinker, self.talker = Tiny(""), Tiny("")

    with pytest.raises(ConfigError, match=r"Omni has no forward; .*: thinker \(Tiny\), talker \(Tiny\)"):
        LookAtForwards().check(Omni(), RunOptions())


def test_a_model_that_says_it_uses_its_blocks_repeatedly_is_refused():
    model = Tiny("")
    model.config = SimpleNamespace(loop_num_passes=1)
    LookAtForwards().check(model, RunOptions())
    model.config.loop_num_passes = 3
    with pytest.raises(ConfigError, match="goes through its decoder blocks 3 times"):
        LookAtForwards().check(model, RunOptions())
