"""What the ranks of the tests do: each function is called on every rank, and what it returns is compared."""

import ctypes
import io
import itertools
import os
import signal
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout

import torch
import transformers
from torch import nn

from optimum_sab import SABConfig
from optimum_sab.calibration.blocks.binarizer import BlockBinarizer
from optimum_sab.calibration.joining import joined
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.pipeline import binarize
from optimum_sab.calibration.predictions import temperature
from optimum_sab.calibration.predictions.last_norm import find_last_norm
from optimum_sab.calibration.progress import no_step
from optimum_sab.calibration.refine import tuning
from optimum_sab.calibration.refine.parameters import ModuleParameters, vectors_of
from optimum_sab.calibration.refine.reconstruction import reconstruct
from optimum_sab.calibration.refine.sums import add_up_gradients, mean_of_all
from optimum_sab.calibration.refine.whole_model import make_student
from optimum_sab.calibration.resume.fingerprint import WeightsDigest, fingerprint
from optimum_sab.calibration.resume.folder import ResumeFolder
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.stage import Stage, run_stages
from optimum_sab.calibration.stages.temperature import ScaleTemperature
from optimum_sab.calibration.streams.passage import BlockPassage, hidden_states
from optimum_sab.cli.main import main
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import NonFiniteError
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.hf.selection import select
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.selection import select_linears
from optimum_sab.nn.unfusing import unfuse_experts
from tests.calibration.conftest import IMAGE, TEXT, build
from tests.calibration.noisy import ONE, head_inputs, sharpened

QUICK = LayerSettings(block_size=32, salient_fraction=0.125, iterations=2, sweeps=1)
REFINED = LayerSettings(block_size=32, iterations=2, propagation=0.01)  # something is left to refine
# imported once, and not by every process
FAMILIES = (
    transformers.LlamaForCausalLM,
    transformers.Qwen2_5_VLForConditionalGeneration,
    transformers.MixtralForCausalLM,
    transformers.MllamaForConditionalGeneration,
)
ENDS = ("10.77.0.1", "10.77.0.2")  # of the cable
STEP = 16.0  # what numbers are rounded to a part of where sums are to be exact


def rank():
    return int(os.environ.get("RANK", 0))


def texts(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(2, IMAGE, (1, n), generator=generator)} for n in lengths]


def rounded(tensor):
    return (tensor * STEP).round().clamp(-64, 64) / STEP


def round_inputs(model):
    """What linears are given has few bits, so that sums of products are exact in fp32, in whatever order."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last.endswith("norm") or last in ("embed_tokens", "o_proj", "down_proj"):
            module.register_forward_hook(lambda m, args, output: rounded(output))
        if last in ("o_proj", "down_proj"):
            module.register_forward_pre_hook(lambda m, args: (rounded(args[0]), *args[1:]))


def packed(model):
    return {n: m.packed.tensors for n, m in model.named_modules() if isinstance(m, SABLinear)}


def quantized(subject, settings=QUICK, folder=None, selection=None, **options):
    """Every rank's packed tensors, and the report."""
    warnings.simplefilter("ignore")
    selection = selection or select_linears(subject.model, settings)
    unfuse_experts(subject.model, selection.experts)
    options = RunOptions(**{"temperature_scaling": False, **options})
    resume = None
    if folder is not None:
        resume = ResumeFolder(folder, fingerprint(WeightsDigest.of(subject.model), selection, subject.samples, options))
    report = binarize(subject.model, selection, subject.samples, options, None, resume)
    return packed(subject.model), report


def llama(lengths, exact=False, settings=QUICK, folder=None, killed=None, **options):
    """A Llama of two blocks; of the rank ``killed`` nothing is left behind its first block."""
    subject = build("llama")
    subject.samples = texts(*lengths)
    if exact:
        round_inputs(subject.model)
    if killed == rank():
        leave = BlockBinarizer.leave

        def dying(self, index, drift):
            leave(self, index, drift)
            os.kill(os.getpid(), signal.SIGKILL)

        BlockBinarizer.leave = dying
    return quantized(subject, settings, folder, **options)


def tempered(whose):
    """The temperature of a Llama whose samples are where ``whose(sample, ranks)`` says: it, its norm, what was sent."""
    temperature.TOKENS, temperature.CHUNK = 150, 16  # some tokens are left out, and chunks do not go round evenly
    subject = build("llama")
    sharpened(subject.model)
    with joined() as ranks:
        pairs = head_inputs(subject, 0.6)
        for pair in pairs[::3]:
            pair.text[::2] = False
        own = [pair for pair in pairs if whose(pair.sample, ranks.size) == ranks.rank]
        last = find_last_norm(subject.model, subject.model.lm_head, ONE)
        found = temperature.set_temperature(subject.model, last, own, None, ranks)
        return found, subject.model.model.norm.weight.detach(), ranks.wire_bytes


def in_turn(sample, size):
    return sample % size


def all_on_the_last(sample, size):
    return size - 1


def nobodys(sample, size):
    return -1


class Meeting(Stage):
    """Waits until all of these have begun, each of which one rank does."""

    def __init__(self, folder, names, name, by):
        self.name, self.by, self._folder, self._names = name, by, folder, names

    def apply(self, run, on_step):
        (self._folder / self.name).touch()
        end = time.monotonic() + 20
        while not all((self._folder / each).exists() for each in self._names):
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} is alone")
            time.sleep(0.01)
        return run.ranks.rank


def meeting(folder):
    """Two stages that are done by one rank each: who did them."""
    model = build("llama").model
    names = ("one", "other")
    with joined() as ranks:
        run = Run(model, select_linears(model, QUICK), ranks=ranks)
        stages = [Meeting(folder, names, name, by) for by, name in enumerate(names)]
        return {each.name: each.section for each in run_stages(run, stages).stages}


def refined(folder=None, killed=None):
    """A Llama whose blocks and whole are refined; the rank ``killed`` dies in a later step of the tuning."""
    subject = build("llama")
    subject.samples = texts(*(12, 7, 9, 12, 5, 12, 8, 12))
    if killed == rank():
        add, taken = tuning.add_up_gradients, itertools.count(1)

        def dying(*args):
            if next(taken) == tuning.SAVE_EVERY + 2:
                os.kill(os.getpid(), signal.SIGKILL)
            add(*args)

        tuning.add_up_gradients = dying
    _, report = quantized(subject, REFINED, folder, refine=RefineSettings(epochs=2, steps=tuning.SAVE_EVERY + 4))
    return subject.model.state_dict(), report


def trained():
    """A Llama that every rank has packed alike, then trained: its first block, then the whole. What came of both."""
    subject = build("llama")
    model, inputs = subject.model, texts(*(12, 7, 9, 12, 5, 12, 8, 12, 12, 12, 6, 12))
    block, called, wanted, given = model.model.layers[0], [], [], []
    hooks = [
        block.register_forward_pre_hook(lambda m, args, kwargs: called.append((args, kwargs)), with_kwargs=True),
        block.register_forward_hook(lambda m, args, output: wanted.append(hidden_states(output))),
        model.lm_head.register_forward_pre_hook(lambda m, args: given.append(args[0])),
    ]
    with torch.no_grad():
        for each in inputs:
            model(**each, use_cache=False)
    for hook in hooks:
        hook.remove()
    packed = {}
    for name, settings in select_linears(model, REFINED).settings.items():
        weight = model.get_submodule(name).weight
        planes = solve(weight.detach(), InputStatistics.without_data(weight.shape[1], weight.device), settings).planes
        packed[name] = PackedWeight.pack(planes, settings)

    with joined() as ranks:
        samples = CalibrationSamples.of(inputs, model.config, ranks)

        def run(sample, parameters):
            args, kwargs = called[sample]
            return torch.func.functional_call(block, parameters, args, kwargs)

        start = "model.layers.0."
        own = {name.removeprefix(start): each for name, each in packed.items() if name.startswith(start)}
        parameters = ModuleParameters(own, torch.float32, vectors_of(block), torch.device("cpu"))
        passage = BlockPassage(block, samples.own, run, lambda sample: wanted[sample], lambda sample, output: None)
        of_block = reconstruct(passage, parameters, 3, 0, ranks)
        found = [tensor.detach() for tensor in parameters.tensors]

        for name, each in packed.items():
            set_module(model, name, SABLinear.from_packed(each, None))
        student = make_student(model, torch.float32)
        shown = {i: tuning.TuningSample(inputs[i], given[i], samples.modalities[i]) for i in samples.own}
        of_model = tuning.tune(student, shown, 12, None, no_step, ranks)
        found += [tensor.detach() for each in student.tuned for tensor in each.parameters.tensors]
        return of_block, of_model, found


def adding_gradients():
    """Gradients of three tensors of which ranks have some: those of all."""
    tensors = [torch.zeros(n, requires_grad=True) for n in (2, 3, 1)]
    with joined() as ranks:
        tensors[ranks.rank].grad = torch.ones_like(tensors[ranks.rank])
        if ranks.rank == 0:
            tensors[1].grad = torch.tensor([1.0, 2.0, 3.0])
        add_up_gradients(ranks, tensors)
        errors = [torch.tensor([4.0, 5.0])] if ranks.rank else []
        return [tensor.grad for tensor in tensors], mean_of_all(ranks, "errors", errors)


def pictures():
    subject = build("qwen2_5_vl")
    return quantized(subject)


def mixture():
    """A Mixtral, whose experts are fused in Transformers 5."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    subject = build("llama")
    subject.model = transformers.MixtralForCausalLM(config).eval()
    subject.samples = texts(40, 30, 50, 20)
    config = SABConfig(block_size=32, iterations=2, sweeps=0)
    return quantized(subject, selection=select(subject.model, config, strict=True))


def crossing():
    """An Mllama with one picture: texts pass its cross-attention by."""
    torch.manual_seed(0)
    sizes = {**TEXT, "num_hidden_layers": 3}
    config = transformers.MllamaConfig(
        text_config={
            **sizes,
            "vocab_size": 64,
            "cross_attention_layers": [1],
            "rope_scaling": {"rope_type": "default"},
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "attention_heads": 2,
            "intermediate_size": 16,
            "vision_output_dim": 32,
            "image_size": 8,
            "patch_size": 4,
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
        image_token_index=IMAGE,
    )
    subject = build("llama")
    subject.model = transformers.MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if "gate" in name:
                parameter.fill_(0.5)  # they start at zero, where nothing comes through
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[5, IMAGE, 7, 8, 9, 20, 21, 22]])
    pictured = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 1, 1, 3, 8, 8, generator=generator),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, ids.shape[1], 1, 1, dtype=torch.long),
    }
    subject.samples = [*texts(9, 12, 7), pictured, *texts(10)]
    return quantized(subject)


def failing(lengths):
    """The last sample has a token that the model does not know."""
    subject = build("llama")
    subject.samples = texts(*lengths)
    if rank() == 1:
        down = subject.model.model.layers[1].mlp.down_proj
        down.register_forward_pre_hook(lambda m, args: (args[0] * float("nan"),))
    return quantized(subject)


def differing(what):
    """The second rank has something of its own."""
    subject = build("llama")
    subject.samples = texts(9, 5, 7)
    settings = QUICK
    if rank() == 1:
        if what == "checkpoint":
            nn.init.zeros_(subject.model.model.layers[1].mlp.up_proj.weight)
        elif what == "samples":
            subject.samples[2]["input_ids"][0, 3] = 1
        elif what == "settings":
            settings = QUICK.replace(iterations=3)
        elif what == "version":
            from optimum_sab.calibration.resume import fingerprint

            fingerprint.__version__ = "0.0.1"
    return quantized(subject, settings)


def joining_twice(caller):
    """Exchanges in two contexts, one after the other; with a group of the caller's, which is there afterwards."""
    from torch import distributed

    if caller:
        distributed.init_process_group("gloo")
    found = []
    for turn in range(2):
        with joined() as ranks, joined() as inner:
            assert inner is ranks
            found.append(ranks.exchange("turn", (ranks.rank, turn)))
            found.append(ranks.give("gift", 1, lambda: torch.full((3,), 7.0)).tolist())
            found.append([each.tolist() for each in ranks.gather("all", torch.tensor([ranks.rank]))])
    assert distributed.is_initialized() == caller
    if caller:
        total = torch.ones(1)
        distributed.all_reduce(total)
        found.append(total.item())
    return found


def summing(width):
    """Sums on their owner, and what they cost."""
    with joined() as ranks:
        rows = torch.arange(float((width + 1) * width)).view(width + 1, width) % 5 + ranks.rank
        matrix, plain = rows.T @ rows, rows.clone()
        ranks.exchange("sums", None)
        before = ranks.wire_bytes
        ranks.sum_symmetric_to(1, matrix, strip=3)
        sent = ranks.wire_bytes - before
        ranks.sum_to(None, plain)
        return matrix, plain, sent


def silent_second():
    """The second rank comes to nothing any more."""
    with joined() as ranks:
        ranks.exchange("before", None)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.exchange("after", None)


def over_a_cable(networks, folder):
    """Each rank in the network of one of these processes; they speak until nothing comes any more."""
    network = os.open(f"/proc/{networks[rank()]}/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(network, 0):
        raise OSError(ctypes.get_errno(), "setns")
    os.environ.update(MASTER_ADDR=ENDS[0], GLOO_SOCKET_IFNAME=f"sab{rank()}")
    with joined() as ranks:
        for step in itertools.count():
            ranks.exchange(f"step {step}", None)
            if step == 10:
                (folder / str(ranks.rank)).touch()
            time.sleep(0.01)


def elsewhere():
    """The second rank is at another place."""
    with joined() as ranks:
        ranks.exchange("here" if ranks.rank != 1 else "there", None)


def command(*arguments):
    """The command line: exit code, standard output and standard error."""
    output, errors = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    with redirect_stdout(output), redirect_stderr(errors):
        code = main(arguments)
    found = []
    for each in (output, errors):
        each.flush()
        found.append(each.buffer.getvalue().decode())
    return code, *found


def failing_command(*arguments):
    """The same, and on the second rank a stage fails."""
    if rank() == 1:

        def fail(self, run, on_step):
            raise NonFiniteError("it holds NaN.")

        ScaleTemperature.apply = fail
    return command(*arguments)
