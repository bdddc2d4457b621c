"""What is held at once: by shapes that can be reckoned by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from optimum_sab.calibration.plan.holdings import in_files
from optimum_sab.calibration.plan.memory import ACCELERATOR, MACHINE, memory_of
from optimum_sab.calibration.plan.shapes import sample_sizes
from optimum_sab.calibration.plan.workload import LinearGroup, SampleSizes
from optimum_sab.calibration.streams.memory import matrices
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.settings import LayerSettings
from tests.calibration.plan.conftest import BLOCKS, INNER, VOCABULARY, WIDTH

TOKENS = 512 * 256
BLOCK = (4 * WIDTH**2 + 3 * INNER * WIDTH) * 2  # bytes
GIB = 2**30


def parts(memory, phase):
    return {part.name: part for part in next(each for each in memory.phases if each.name == phase).parts}


def test_blocks_hold_activations_statistics_and_the_dense_model(work):
    (memory,) = memory_of(work, process=300)
    assert memory.device == MACHINE
    found = parts(memory, "blocks")
    assert found["the process and its samples"].bytes == 300
    assert found["weights outside of the blocks"].bytes == 2 * VOCABULARY * WIDTH * 2
    assert found["dense blocks"].bytes == BLOCKS * BLOCK
    assert found["activations of all samples"].bytes == TOKENS * 2 * (INNER + 4 * WIDTH) * 2
    weights = 4 * 4 * WIDTH * INNER  # four arrays of the widest linear in fp32
    assert found["statistics of the widest linear"].bytes == matrices(INNER, WIDTH, 2) * 4 * INNER**2 + weights


@pytest.mark.parametrize(("count", "together"), [(128, 4), (3, 3)])
def test_experts_that_wait_and_what_was_found_for_them_are_counted(work, count, together):
    inner, width = 2 * WIDTH, 4 * WIDTH
    expert = LinearGroup(1, inner, width, LayerSettings(), 0.1, expert=True)
    block = replace(work.model.blocks[0], groups=(*work.model.blocks[0].groups, *[expert] * count))
    (memory,) = memory_of(replace(work, model=replace(work.model, blocks=(block,) * BLOCKS)))
    one = matrices(width, inner, 2) * 4 * width**2 + 4 * 4 * width * inner
    waiting = together * 4 * 4 * width**2  # four matrices of 64 MiB each; a GiB and no more
    signs, found = together * 2 * width * inner, count * width * inner * 2
    assert parts(memory, "blocks")["statistics of the widest linear"].bytes == one + waiting + signs + found


def test_parts_add_up_to_the_peak_and_no_stage_takes_more(work, changed):
    for each in (work, changed(work, streamed=True), changed(work, copied=1.0)):
        for memory in memory_of(each, process=10**8):
            assert memory.peak.bytes == sum(part.bytes for part in memory.peak.parts)
            assert all(phase.bytes <= memory.peak.bytes for phase in memory.phases)
            for phase in memory.phases:
                assert all(0 <= part.certain <= part.bytes for part in phase.parts), phase.name


def test_streaming_holds_one_dense_block_and_a_packed_one_in_the_place_of_all(work, changed):
    (memory,) = memory_of(work)
    (streamed,) = memory_of(changed(work, streamed=True))
    before, after = parts(memory, "blocks"), parts(streamed, "blocks")
    packed = (BLOCK // 2) * 5 // 32
    assert after["one dense block"].bytes == BLOCK
    assert "dense blocks" not in after and "packed blocks" not in after
    assert before["packed blocks"].bytes == BLOCKS * packed and after["a packed block"].bytes == packed
    assert not any("outside" in name for name in after)  # given back before a block is called
    outside = parts(streamed, "sensitivities")["weights outside of the blocks, in use"].bytes
    assert outside == VOCABULARY * WIDTH * 2  # of two such matrices one
    spared = (BLOCKS - 1) * (BLOCK + packed) + 2 * VOCABULARY * WIDTH * 2
    assert memory.peak.bytes - streamed.peak.bytes == spared
    assert (
        streamed.certain.certain
        < BLOCK + after["statistics of the widest linear"].certain + 2 * TOKENS * 2 * (INNER + WIDTH) + 1
    )


def test_what_is_mapped_is_not_certain_and_what_is_copied_is(work, changed):
    (mapped,), (copied,) = memory_of(work), memory_of(changed(work, copied=1.0))
    assert parts(mapped, "blocks")["dense blocks"].certain == 0
    assert parts(copied, "blocks")["dense blocks"].certain == BLOCKS * BLOCK
    half = memory_of(changed(work, copied=0.25))[0]
    assert parts(half, "blocks")["dense blocks"].certain == BLOCKS * BLOCK // 4


def test_activation_memory_bounds_activations_and_sends_the_rest_to_files(work, changed):
    bounded = changed(work, activation_memory=GIB)
    (memory,) = memory_of(bounded)
    held = parts(memory, "blocks")["activations of all samples"]
    assert held.bytes == held.certain == GIB
    whole = parts(memory_of(work)[0], "blocks")["activations of all samples"].bytes
    assert in_files(bounded) == whole - GIB
    assert in_files(work) == 0


def test_activation_memory_bounds_the_inputs_of_streamed_blocks_while_sensitivities_are_measured(work, changed):
    streamed = changed(work, streamed=True)
    small = changed(streamed, activation_memory=2**20)
    whole, bounded = (
        parts(memory_of(each)[0], "sensitivities")["gradients of the sensitivities"].bytes for each in (streamed, small)
    )
    inputs = 16 * 256 * (BLOCKS + 2) * WIDTH * 2
    assert whole - bounded == inputs - 2**20
    half = parts(memory_of(replace(streamed, ranks=2))[0], "sensitivities")["gradients of the sensitivities"].bytes
    assert whole - half == inputs // 2  # of two processes each has eight samples
    few = changed(small, samples=replace(work.samples, tokens=(256,) * 16))
    deep = replace(few, model=replace(work.model, blocks=work.model.blocks * 20))
    assert in_files(deep) == 16 * 256 * (20 * BLOCKS + 2) * WIDTH * 2 - 2**20  # which is more than lies there later
    assert in_files(replace(deep, streamed=False)) < in_files(deep)


def test_an_accelerator_has_the_graph_of_a_block_and_the_machine_its_inputs(work, changed):
    here, away = (changed(work, streamed=True, device=device) for device in (None, torch.device("cuda")))
    name = "gradients of the sensitivities"
    whole, machine = (parts(memory_of(each)[0], "sensitivities")[name].bytes for each in (here, away))
    assert whole - machine == parts(memory_of(away)[1], "sensitivities")[name].bytes


def test_tokens_that_are_only_bounded_are_not_certain(work, changed):
    unread = changed(work, samples=replace(work.samples, exact=False))
    held = parts(memory_of(unread)[0], "blocks")["activations of all samples"]
    assert held.bytes > 0 and held.certain == 0


def test_an_accelerator_has_a_block_and_statistics_and_the_machine_hidden_states(work, changed):
    machine, device = memory_of(changed(work, device=torch.device("cuda")))
    assert (machine.device, device.device) == (MACHINE, ACCELERATOR)
    assert "statistics of the widest linear" not in parts(machine, "blocks")
    assert parts(machine, "blocks")["activations of all samples"].bytes == 2 * TOKENS * 2 * WIDTH * 2
    found = parts(device, "blocks")
    assert set(found) == {"one dense block", "activations of all samples", "statistics of the widest linear"}
    assert found["activations of all samples"].bytes == TOKENS * 2 * (INNER + 4 * WIDTH) * 2


def test_a_model_on_an_accelerator_is_all_there(work, changed):
    (memory,) = memory_of(changed(work, main=torch.device("cuda")), process=10**9)
    assert memory.device == ACCELERATOR
    found = parts(memory, "blocks")
    assert found["dense blocks"].certain == BLOCKS * BLOCK
    assert "the process and its samples" not in found


def test_refinement_and_tuning_have_stages_of_their_own(work, changed):
    refined = changed(work, refine=RefineSettings(epochs=1, steps=10))
    (memory,) = memory_of(refined)
    assert parts(memory, "blocks")["training a block"].bytes > 3 * (BLOCK // 2) * 4
    teacher = parts(memory, "tuning")["hidden states at the head"]
    assert teacher.bytes == teacher.certain == TOKENS * WIDTH * 2
    assert "tuning" not in [phase.name for phase in memory_of(work)[0].phases]


def test_logits_are_made_of_what_is_judged_alone(work, changed):
    """A large picture has many tokens that nobody predicts."""
    tuned = changed(work, refine=RefineSettings(epochs=0, steps=10))
    few = changed(tuned, samples=replace(work.samples, most_judged=16, judged_share=1 / 16))
    row = 8 * VOCABULARY * 4  # eight arrays
    for phase, part, samples in (
        ("sensitivities", "gradients of the sensitivities", 1),
        ("tuning", "a step of training", 4),
    ):
        all_of_it, less = (parts(memory_of(each)[0], phase)[part].bytes for each in (tuned, few))
        assert all_of_it - less == samples * (256 - 16) * row
    assert replace(work.samples, most_judged=10**6).most_logits == 256


def test_of_pictures_the_text_is_judged():
    config = SimpleNamespace(image_token_id=60)
    read = [{"input_ids": torch.tensor([[1, 60, 60, 60, 2]])}, {"input_ids": torch.tensor([[3, 4, 5]])}]
    found = sample_sizes(read, read[:1], SimpleNamespace(patch=0), config)
    assert (found.tokens, found.most_judged, found.judged_share, found.judged) == ((5, 3), 3, 5 / 8, (2,))


def test_one_of_several_processes_is_taken_to_have_the_shortest_samples():
    sizes = SampleSizes((5, 1, 9, 3, 7), patches=11)
    assert (sizes.share(2).tokens, sizes.share(2).patches) == ((1, 3), 5)
    assert sizes.share(9).tokens == (1,)
