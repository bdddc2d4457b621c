"""Plant faults one at a time and see that the fast suite catches each. Run by hand, outside CI:

    .venv/bin/python -m tests.repo.planted_faults            all of them, in about half an hour on two cores
    .venv/bin/python -m tests.repo.planted_faults scale tail those whose names hold one of these words

Each is planted in a copy of the repository, and the tests named beside it, which are part of the ordinary run, are run
there until the first fails. A fault that none of them notices ends the command with status 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("optimum_sab", "kernels", "tests", "docs", "pyproject.toml", "setup.py", "README.md", "CHANGELOG.md")


@dataclass(frozen=True)
class Fault:
    """One line made wrong.

    Attributes:
        name: what is wrong then.
        file: where.
        right: what stands there, once.
        wrong: what is put in its place.
        tests: folders or files of the ordinary run that have to notice.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "bits of a byte packed in the other order",
        "optimum_sab/format/bits.py",
        "return (groups << shifts).sum(-1, dtype=torch.uint8)",
        "return (groups.flip(-1) << shifts).sum(-1, dtype=torch.uint8)",
        ("tests/format",),
    ),
    Fault(
        "the signs of a residual plane flipped in the packing",
        "optimum_sab/format/packed_weight.py",
        "pack_bits(planes.residual_sign)",
        "pack_bits(~planes.residual_sign)",
        ("tests/format",),
    ),
    Fault(
        "row scales not rounded after the refit",
        "optimum_sab/core/refit.py",
        "fit.row_scale = round_row_scale(found, fit.settings.row_scale)",
        "fit.row_scale = found",
        ("tests/core/test_solver.py",),
    ),
    Fault(
        "the error of a column not fed back",
        "optimum_sab/core/feedback.py",
        "error, alpha=-1.0)",
        "error, alpha=0.0)",
        ("tests/core/test_feedback.py",),
    ),
    Fault(
        "the error of a block not fed back to later blocks",
        "optimum_sab/core/fitting.py",
        "rest[..., end:] -= errors @ U[..., start:end, end:]",
        "rest[..., end:] -= 0.0 * errors @ U[..., start:end, end:]",
        ("tests/core/test_solver.py",),
    ),
    Fault(
        "a modality weighed double",
        "optimum_sab/core/hessian.py",
        "return {name: 1.0 / (mean[name] * len(mean)) for name in mean}",
        'return {name: (1 + (name == "visual")) / (mean[name] * len(mean)) for name in mean}',
        ("tests/core/test_hessian.py",),
    ),
    Fault(
        "the drift between the streams with the wrong sign",
        "optimum_sab/core/hessian.py",
        "apart = self._finite(modality, dense) - x",
        "apart = x - self._finite(modality, dense)",
        ("tests/core/test_hessian.py",),
    ),
    Fault(
        "the gradient of sign descent left stale between columns",
        "optimum_sab/core/descent.py",
        "gradient[j + 1 :].addr_(local[j, j + 1 :], change)",
        "gradient[j + 1 :].addr_(local[j, j + 1 :], 0.0 * change)",
        ("tests/core/test_descent.py",),
    ),
    Fault(
        "an unvalidated header: shape and dtype of a stored tensor not looked at",
        "optimum_sab/hf/checkpoint.py",
        "if (found.shape, found.dtype) != (spec.shape, _DTYPES[spec.dtype]):",
        "if False:",
        ("tests/hf/test_quantizer.py",),
    ),
    Fault(
        "scales that are NaN accepted",
        "optimum_sab/format/packed_weight.py",
        "if not bool(torch.isfinite(self.row_scale()).all() and torch.isfinite(self.column_scale()).all()):",
        "if False:",
        ("tests/format/test_packed_weight.py",),
    ),
    Fault(
        "a known layer recognized by its addresses alone",
        "optimum_sab/ops/cpu/layer.py",
        "if found is None or found[0] != seen:",
        "if found is None:",
        ("tests/ops/cpu/test_direct.py",),
    ),
    Fault(
        "tables shared by siblings whose columns are no longer the same",
        "optimum_sab/ops/cpu/binary_linear.c",
        "of.tables_of[m] = m && same_tables(layer[m - 1], layer[m]) ?",
        "of.tables_of[m] = m ?",
        ("tests/nn/test_direct_group.py",),
    ),
    Fault(
        "column scales of the first expert for all",
        "optimum_sab/ops/cpu/experts.h",
        "expert * stack->stride.col_scale",
        "0 * stack->stride.col_scale",
        ("tests/ops/cpu/test_experts.py",),
    ),
    Fault(
        "a pair that reads another row",
        "optimum_sab/ops/cpu/experts.h",
        "pair / of->repeats",
        "pair % of->repeats",
        ("tests/ops/cpu/test_experts.py",),
    ),
    Fault(
        "a coded plane's shifts that carry nothing into the next panel",
        "optimum_sab/ops/cpu/coded.h",
        "before[g] = words[(WORDS - 1) * GROUPS + g];",
        "before[g] = (veci){0};",
        ("tests/ops/cpu/test_kernel.py",),
    ),
    Fault(
        "dot products that count bits of the piece before",
        "optimum_sab/ops/cpu/dots.h",
        "                inside <<= lead;",
        "                ;",
        ("tests/ops/cpu/test_kernel.py",),
    ),
    Fault(
        "the dispatcher passed by under autocast",
        "optimum_sab/ops/cpu/direct.py",
        "        and not torch._C._is_any_autocast_enabled()\n",
        "",
        ("tests/ops/cpu/test_direct.py",),
    ),
    Fault(
        "OpenMP's barrier waited at again after it has lost time",
        "optimum_sab/ops/cpu/pool.h",
        "openmp_rests_until = end + rest;",
        "openmp_rests_until = end;",
        ("tests/ops/cpu/test_pool.py",),
    ),
    Fault(
        "a stale group: its stack not renewed after the members were moved",
        "optimum_sab/nn/input_group.py",
        "if tuple(m.weight.data_ptr() for m in self.members) == self._pointers:",
        "if self._pointers:",
        ("tests/nn/test_input_group.py",),
    ),
    Fault(
        "an output taken from a group though the input was changed in place",
        "optimum_sab/nn/input_group.py",
        "if not tracing and pending.version != _version(inputs):",
        "if False:",
        ("tests/nn/test_input_group.py",),
    ),
    Fault(
        "a wrong tail mask: the columns behind the last one read as if they were there",
        "kernels/torch-ext/sab_kernels/scaled.py",
        "mask=(row >= 0)[:, None] & inside[None, :],",
        "mask=(row >= 0)[:, None],",
        ("tests/kernels/test_linear.py",),
    ),
    Fault(
        "the last part of a split product left out",
        "kernels/torch-ext/sab_kernels/finish.py",
        "for p in range(SPLIT):",
        "for p in range(SPLIT - 1):",
        ("tests/kernels/test_linear.py",),
    ),
    Fault(
        "the quantized stream goes on through the dense weight",
        "optimum_sab/calibration/streams/block_visit.py",
        "return nn.functional.linear(inputs, self._weights[name], linear.bias)",
        "return original(inputs)",
        ("tests/calibration/streams/test_lockstep.py",),
    ),
    Fault(
        "grad mode leaks from one coroutine into another",
        "optimum_sab/calibration/streams/coroutines.py",
        "        self._main.switch(pause)\n        state.restore()",
        "        self._main.switch(pause)",
        ("tests/calibration/streams/test_lockstep.py",),
    ),
    Fault(
        "rows of an expert paired with those of other tokens",
        "optimum_sab/calibration/statistics/pairing.py",
        "return len(self.came) < company or self.fewer",
        "return self.fewer",
        ("tests/calibration/statistics",),
    ),
    Fault(
        "samples halved by their place on a rank",
        "optimum_sab/calibration/statistics/group_inputs.py",
        "half = _half(facts.came) if two_streams",
        "half = _half(tuple(pairs)) if two_streams",
        ("tests/calibration/test_joined_ranks.py",),
    ),
    Fault(
        "each rank takes the next of its own groups of linears",
        "optimum_sab/calibration/streams/block_visit.py",
        "offers = [each for some in offered for each in some]",
        "offers = offered[self._ranks.rank]",
        ("tests/calibration/test_joined_ranks.py",),
    ),
    Fault(
        "the lower half of a summed Hessian left as one rank's",
        "optimum_sab/calibration/ranks.py",
        "matrix[end:, start:end] = rows[:, end - start :].T",
        "pass",
        ("tests/calibration/test_joined_ranks.py",),
    ),
    Fault(
        "a row of an expert beside the dense row of another token",
        "optimum_sab/calibration/statistics/pairing.py",
        "other[at >= 0] = dense.inputs[at[at >= 0]]",
        "other[at >= 0] = dense.inputs[: int((at >= 0).sum())]",
        ("tests/calibration/statistics", "tests/calibration/streams/test_experts.py"),
    ),
    Fault(
        "rows of an expert taken for the sample's first tokens",
        "optimum_sab/calibration/statistics/pairing.py",
        "labels[tokens.to(labels.device)], False",
        "labels[: tokens.numel()], False",
        ("tests/calibration/statistics", "tests/calibration/streams/test_experts.py"),
    ),
    Fault(
        "an expert's own moments weighed as if it had more tokens",
        "optimum_sab/core/mixture.py",
        "tokens / (tokens + full / SHARED)",
        "tokens / (tokens + full / (4 * SHARED))",
        ("tests/core/test_mixture.py",),
    ),
    Fault(
        "an expert's own moments and the shared ones in each other's place",
        "optimum_sab/core/mixture.py",
        "return own * share + shared * (1.0 - share)",
        "return own * (1.0 - share) + shared * share",
        ("tests/core/test_mixture.py",),
    ),
    Fault(
        "row scales of the first expert for all in the kernels",
        "kernels/torch-ext/sab_kernels/expert_tiles.py",
        "layer.row_scale + e * (",
        "layer.row_scale + 0 * (",
        ("tests/kernels/test_experts.py",),
    ),
    Fault(
        "salient columns of the first expert for all in the kernels",
        "kernels/torch-ext/sab_kernels/expert_tiles.py",
        "inputs.residual_index + e * (",
        "inputs.residual_index + 0 * (",
        ("tests/kernels/test_experts.py",),
    ),
    Fault(
        "a tile of pairs that begins where the one before it does",
        "kernels/torch-ext/sab_kernels/expert_tiles.py",
        "(tile[:, None] - (tile_stop - count)[None, :]) * PAIRS",
        "(tile[:, None] - (tile_stop - count)[None, :]) * (PAIRS - 1)",
        ("tests/kernels/test_expert_tiles.py",),
    ),
    Fault(
        "pairs of routed tokens that belong to the tokens one after the other",
        "optimum_sab/nn/routing.py",
        "return each // self.top_k if self.top_k else each % self.tokens",
        "return each % self.tokens",
        ("tests/calibration/streams/test_experts.py", "tests/calibration/blocks/test_experts.py"),
    ),
    Fault(
        "a family's converter applied to packed tensors",
        "optimum_sab/hf/stored_names.py",
        "return (source_key, None) if source_key in packed else kind.rename_source_key(self, source_key)",
        "return kind.rename_source_key(self, source_key)",
        ("tests/hf/test_stored_names.py",),
    ),
    Fault(
        "a weight that the model reads not noticed",
        "optimum_sab/calibration/streams/observation.py",
        "            self.read.setdefault(name, asked)\n",
        "            pass\n",
        ("tests/calibration/streams/test_observation.py",),
    ),
    Fault(
        "a picture tower taken for the decoder",
        "optimum_sab/nn/decoder.py",
        "candidates = [each for each in lists if id(each) not in foreign] or lists",
        "candidates = lists",
        ("tests/nn/test_decoder.py",),
    ),
    Fault(
        "a sample that passes a block by taken for the block's end",
        "optimum_sab/calibration/streams/lockstep.py",
        "here[worker] if worker in here else past[worker] for worker in waiting",
        'here.get(worker, Pause(_END, "")) for worker in waiting',
        ("tests/calibration/streams/test_lockstep.py",),
    ),
    Fault(
        "a resume folder of other samples accepted",
        "optimum_sab/calibration/resume/fingerprint.py",
        "                _update(data, name, value, value.flatten())",
        "                _update(data, name, value, value.flatten()[:0])",
        ("tests/calibration/resume",),
    ),
    Fault(
        "stages begun before all were prepared",
        "optimum_sab/calibration/stage.py",
        "            stage.prepare(run)\n        done",
        "            pass\n        done",
        ("tests/calibration/test_stage.py",),
    ),
    Fault(
        "the temperature taken the wrong way round",
        "optimum_sab/calibration/predictions/temperature.py",
        "return Temperature(1.0 / scale, before, after)",
        "return Temperature(scale, before, after)",
        ("tests/calibration/predictions/test_temperature.py",),
    ),
    Fault(
        "the divergence of the dense from the binarized model instead of the other",
        "optimum_sab/calibration/predictions/divergence.py",
        "return (p.exp() * (p - q)).sum(-1)",
        "return (q.exp() * (q - p)).sum(-1)",
        ("tests/calibration/predictions/test_divergence.py",),
    ),
    Fault(
        "unknown settings dropped in silence",
        "optimum_sab/hf/config.py",
        "        if unknown:\n            raise _unknown(next(iter(unknown)))\n",
        "",
        ("tests/hf/test_config.py",),
    ),
    Fault(
        "bits counted without the column scales",
        "optimum_sab/format/packed_weight.py",
        "return sum(t.numel() * t.element_size() for t in self.tensors.values())",
        'return sum(t.numel() * t.element_size() for n, t in self.tensors.items() if n != "col_scale")',
        ("tests/format/test_packed_weight.py",),
    ),
    Fault(
        "a packed layer that is another than was saved is loaded",
        "optimum_sab/hf/verification.py",
        "if digest(tensor) != digests[stored]:",
        "if digest(tensor) is None:",
        ("tests/hf/test_integrity.py",),
    ),
    Fault(
        "the sums of a digest's columns are left out",
        "optimum_sab/format/digest.py",
        "    found.update(columns.tobytes())\n",
        "",
        ("tests/format/test_digest.py",),
    ),
    Fault(
        "a config.json of another save goes with any weights",
        "optimum_sab/hf/one_save.py",
        "if file.save is not None and file.save != expected:",
        "if file.save is not None and expected is None:",
        ("tests/hf/test_integrity.py",),
    ),
    Fault(
        "NaN in what is not packed is loaded",
        "optimum_sab/hf/finite.py",
        "    low, high = torch.aminmax(tensor)\n",
        "    low, high = torch.aminmax(tensor.nan_to_num())\n",
        ("tests/hf/test_integrity.py",),
    ),
    Fault(
        "a coded plane without its oldest bit",
        "optimum_sab/core/code.py",
        "plane[:, k:] ^= stored[:, : width - k]",
        "plane[:, k:] ^= stored[:, : width - k] & (k < 4)",
        ("tests/core/test_code.py",),
    ),
    Fault(
        "coded survivors that disagree with what is settled kept",
        "optimum_sab/core/trellis.py",
        "self._cost = torch.where(agrees, self._cost - self._cost.gather(1, best), LOST)",
        "self._cost = self._cost - self._cost.gather(1, best)",
        ("tests/core/test_trellis.py", "tests/ops/cpu/test_trellis.py"),
    ),
    Fault(
        "coded columns behind a window that its bits reach left out of the search",
        "optimum_sab/core/coded.py",
        "stop = min(end + memory, width)",
        "stop = end",
        ("tests/core/test_coded.py",),
    ),
    Fault(
        "coded scales whose derived planes are not tied",
        "optimum_sab/core/planes.py",
        "spread = (part * stored).T.repeat_interleave(widths, dim=1)",
        "spread = stored.T.repeat_interleave(widths, dim=1)",
        ("tests/core/test_code.py",),
    ),
    Fault(
        "coded planes of a checkpoint read as plain ones where config.json says so",
        "optimum_sab/hf/checkpoint.py",
        "if saved is not None and saved.get(setting, default) != given:",
        'if saved is not None and setting != "code" and saved.get(setting, default) != given:',
        ("tests/hf/test_coded.py",),
    ),
    Fault(
        "shares: columns of a block on both sides given the row scales of the block before",
        "optimum_sab/format/share.py",
        "blocks = slice(piece.start // size, -(-piece.stop // size))",
        "blocks = slice(max(piece.start // size - 1, 0), max(-(-piece.stop // size) - 1, 1))",
        ("tests/format/test_share.py",),
    ),
    Fault(
        "shares: every process takes the first columns' scales and residual signs",
        "optimum_sab/hf/shares.py",
        "start = columns * self._rank",
        "start = 0",
        ("tests/hf/contract/test_sharing.py",),
    ),
    Fault(
        "shares: biases of experts added by every process",
        "optimum_sab/hf/sharing.py",
        "if not (fits and plain and packed):",
        "if not (fits and packed):",
        ("tests/hf/contract/test_sharing.py",),
    ),
    Fault(
        "columns of a launch not told what those before them have left",
        "kernels/torch-ext/sab_kernels/columns.py",
        "x -= later[:, None] * change[None, :]",
        "x -= 0.0 * later[:, None] * change[None, :]",
        ("tests/kernels/test_columns.py",),
    ),
    Fault(
        "salient columns of a stack's first weight for all in the loops over columns",
        "kernels/torch-ext/sab_kernels/columns.py",
        "salient_ptr = levels.salient + weight * width",
        "salient_ptr = levels.salient",
        ("tests/kernels/test_columns.py",),
    ),
    Fault(
        "a later failure in a stack counts before an earlier one",
        "optimum_sab/core/many.py",
        "            failure = error  # those before it may fail yet, and would count\n            break",
        "            raise error",
        ("tests/core/test_many.py",),
    ),
    Fault(
        "a triangle's corner inverted with the wrong sign",
        "optimum_sab/core/factorization.py",
        "    B.neg_()\n",
        "",
        ("tests/core/test_factorization.py",),
    ),
    Fault(
        "a tensor of the solver made on the CPU whatever device it is for",
        "optimum_sab/core/planes.py",
        "block_bounds(self.in_features, self.block_size)], device=scale.device)",
        "block_bounds(self.in_features, self.block_size)])",
        ("tests/accelerator",),
    ),
    Fault(
        "gradients of a step of which every rank keeps its own",
        "optimum_sab/calibration/refine/sums.py",
        "    ranks.sum_to(None, flat)\n",
        "    flat *= ranks.size\n",
        ("tests/calibration/test_joined_ranks.py",),
    ),
    Fault(
        "a step's gradients over the tokens of a rank's own samples",
        "optimum_sab/calibration/refine/reconstruction.py",
        "sum(tokens[i] for i in batch))",
        "sum(tokens[i] for i in batch if i in own))",
        ("tests/calibration/test_joined_ranks.py",),
    ),
    Fault(
        "a refined model judged by a rank's own samples",
        "optimum_sab/calibration/refine/sums.py",
        "ranks.exchange(at, own)).mean()",
        "ranks.exchange(at, own)[: 1]).mean()",
        ("tests/calibration/test_joined_ranks.py",),
    ),
    Fault(
        "rows of a sketch added up without their signs",
        "optimum_sab/core/target.py",
        "matrix * sign.to(matrix.device, matrix.dtype)",
        "matrix",
        ("tests/core/test_target.py",),
    ),
    Fault(
        "coded columns of a share without the word before them",
        "optimum_sab/format/share.py",
        "        weight[0, :, front // WORD - 1] = before\n",
        "",
        ("tests/format/test_share.py",),
    ),
    Fault(
        "coded columns of a share behind this process's own last word",
        "optimum_sab/hf/shares.py",
        "gathered[self._rank - 1]",
        "gathered[self._rank]",
        ("tests/hf/contract/test_sharing.py",),
    ),
    Fault(
        "stacked experts handed over to be copied",
        "optimum_sab/hf/saving.py",
        "            state[name] = apart(tensor)\n",
        "            pass\n",
        ("tests/hf/test_experts.py",),
    ),
    Fault(
        "ranks with as many samples and tokens taken for the same run",
        "optimum_sab/calibration/resume/fingerprint.py",
        "tokens, {data.hexdigest()[:16]}",
        "tokens",
        ("tests/calibration/test_joined_ranks.py", "tests/calibration/resume"),
    ),
    Fault(
        "a network that is cut waited for",
        "optimum_sab/calibration/last_words.py",
        "self._thread.join(seconds)",
        "self._thread.join()",
        ("tests/calibration/test_network.py",),
    ),
    Fault(
        "zeros around a share's inputs on the wrong sides",
        "optimum_sab/nn/shared.py",
        "pad(inputs, self.around)",
        "pad(inputs, self.around[::-1])",
        ("tests/nn/test_shared.py",),
    ),
    Fault(
        "logits of every token of a picture while sensitivities are measured",
        "optimum_sab/calibration/allocation/sensitivity.py",
        "return (hidden[:, which.to(hidden.device)], *args[1:])",
        "return None",
        ("tests/calibration/allocation",),
    ),
    Fault(
        "a tuning that judges the teacher's first tokens",
        "optimum_sab/calibration/refine/tuning.py",
        "teacher[counted.to(teacher.device)][None]",
        "teacher[:, : int(counted.sum())]",
        ("tests/calibration/refine",),
    ),
    Fault(
        "a temperature whose chunks are added by rank",
        "optimum_sab/calibration/predictions/scaled.py",
        "turns = zip_longest(*told)",
        "turns = told",
        ("tests/calibration/predictions",),
    ),
    Fault(
        "a temperature of every rank's own tokens",
        "optimum_sab/calibration/predictions/temperature.py",
        "first[sample] = -place % step",
        "first[sample] = 0",
        ("tests/calibration/predictions",),
    ),
    Fault(
        "inputs of streamed blocks that stay in memory",
        "optimum_sab/calibration/allocation/blockwise.py",
        "for index in range(count)], whole, self._mapped)",
        "for index in range(count)], whole)",
        ("tests/calibration/allocation",),
    ),
    Fault(
        "stages of one rank each, one after the other",
        "optimum_sab/calibration/stage.py",
        "owners = {stage.name: (stage.by or 0) % run.ranks.size for stage in stages}",
        "owners = {stage.name: 0 for stage in stages}",
        ("tests/calibration/test_joined_ranks.py",),
    ),
)


def plant(fault: Fault, folder: Path) -> None:
    """Make the fault in a copy of the repository.

    Raises:
        LookupError: what is to be made wrong does not stand there once: the list is out of date.
    """
    path = folder / fault.file
    source = path.read_text(encoding="utf-8")
    if source.count(fault.right) != 1:
        raise LookupError(f"{fault.name!r}: {fault.right!r} stands {source.count(fault.right)} times in {fault.file}.")
    path.write_text(source.replace(fault.right, fault.wrong), encoding="utf-8")


def caught_by(fault: Fault) -> str | None:
    """The first test that fails with the fault; None if all pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in COPIED:
            place = ROOT / each
            if place.is_dir():
                shutil.copytree(place, folder / each, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(place, folder / each)
        plant(fault, folder)
        paths = os.pathsep.join([str(folder), str(folder / "kernels" / "torch-ext")])
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests]
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            said = done.stdout[-2000:] + done.stderr[-2000:]
            raise RuntimeError(f"{fault.name!r}: the tests could not be run.\n{said}")
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failed[0] if failed else None


def main(words: list[str]) -> int:
    """Plant those that are asked for, all without words; the exit status."""
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    missed = 0
    for fault in chosen:
        started = time.perf_counter()
        test = caught_by(fault)
        missed += test is None
        seconds = time.perf_counter() - started
        print(f"{'MISSED' if test is None else 'caught'} in {seconds:4.0f} s   {fault.name}   {test or ''}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
