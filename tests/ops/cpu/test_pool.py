"""Threads that share a product: the same bits whoever computes what, and nobody waits for a thread without a core."""

import ctypes
import os
import select
import subprocess
import sys
import threading

import pytest
import torch

from optimum_sab.ops.cpu import compiler, kernel

FITS, OWN, OPENMP = 0, 1, 2  # of sab_whose_threads
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks at threads, or stops them, as Linux does"
)
several_cores = pytest.mark.skipif(CORES < 2, reason="there is one core, and no thread beside the caller")

LAYER = """
import os, sys, threading, torch
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.random_weight import random_packed
from optimum_sab.ops.cpu import kernel
from optimum_sab.ops.cpu.compiler import load_library

packed = random_packed(331, 1024, LayerSettings())
coded = random_packed(331, 1024, LayerSettings(code="trellis16"))
x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1))
library = load_library()
torch.set_num_threads(1)
expected, expected_of_coded = kernel.linear(x, packed), kernel.linear(x, coded)
torch.set_num_threads(2)

def compute(times=1):
    for _ in range(times):
        assert torch.equal(kernel.linear(x, packed), expected)
        assert torch.equal(kernel.linear(x, coded), expected_of_coded)

def tasks():
    return {int(name) for name in os.listdir("/proc/self/task")}
"""


@pytest.fixture
def threads():
    """``threads(count, whose)`` for the test."""
    library, before = compiler.load_library(), torch.get_num_threads()

    def choose(count, whose=FITS):
        torch.set_num_threads(count)
        library.sab_whose_threads(whose)

    yield choose
    choose(before)


def random_inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def start(warm):
    """``start(code, *arguments)``: a process with the layer, which has computed nothing before."""

    def begin(code, *arguments):
        command = [warm / "python", "-c", LAYER + code, *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    return begin


def finish(process, seconds=60):
    """What it says until its end, which must come."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        pytest.fail("it hangs")
    assert process.returncode == 0, output
    return output


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["none", "trellis16"])
@pytest.mark.parametrize("whose", [FITS, OWN, OPENMP])
@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
def test_results_depend_neither_on_how_many_threads_there_are_nor_on_whose(random_packed, threads, whose, tokens, code):
    packed = random_packed(331, 1024, code=code)
    for dtype in kernel.DTYPES:
        x, bias = random_inputs(tokens, 1024, dtype=dtype), random_inputs(331, dtype=dtype)
        threads(1)
        alone, dense = kernel.linear(x, packed, bias), kernel.dequantize(packed, dtype)
        for count in (2, 3, 64, 1000):
            threads(count, whose)
            for _ in range(3):
                assert torch.equal(kernel.linear(x, packed, bias), alone)
            assert torch.equal(kernel.dequantize(packed, dtype), dense)


@pytest.mark.parametrize("whose", [FITS, OWN, OPENMP])
def test_callers_at_the_same_time_do_not_disturb_each_other(random_packed, threads, whose):
    """More of them than are helped."""
    codes = ("none", "trellis16", "trellis16")
    layers = [random_packed(331, 1024, seed, code=code) for seed, code in enumerate(codes)]
    inputs = [random_inputs(tokens, 1024) for tokens in (1, 5, 9)]
    threads(1)
    expected = [kernel.linear(x, packed) for x, packed in zip(inputs, layers)]
    wrong = []

    def compute(number):
        torch.set_num_threads(3)  # of this thread
        for _ in range(20):
            if not torch.equal(kernel.linear(inputs[number % 3], layers[number % 3]), expected[number % 3]):
                wrong.append(number)

    threads(3, whose)
    callers = [threading.Thread(target=compute, args=(number,)) for number in range(20 if whose == OWN else 4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert wrong == [] and not any(caller.is_alive() for caller in callers)


# -- threads -----------------------------------------------------------------------------------------------------------


@linux
def test_helpers_are_fewer_than_cores_and_take_no_signals(start):
    code = """
torch.set_num_threads(1000)
before = tasks()
compute(5)
for helper in tasks() - before:
    blocked = [line.split()[1] for line in open(f"/proc/self/task/{helper}/status") if line.startswith("SigBlk")]
    print(int(blocked[0], 16) >> (signal.SIGINT - 1) & 1)
"""
    assert finish(start("import signal" + code)).split() == ["1"] * (CORES - 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_forked_processes_compute(start):
    """They have none of the threads that their parent used; nor have those that are forked from them."""
    code = """
from torch.utils.data import DataLoader, Dataset
from optimum_sab.nn.linear import SABLinear

layer = SABLinear.from_packed(packed)

class Data(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index % 2:
            torch.set_num_threads(2)  # a worker has one by itself
        return layer(x * 1.0)

def in_a_child(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    compute(5)
    assert os.waitpid(child, 0)[1] == 0

for whose in (0, 1):
    library.sab_whose_threads(whose)
    compute(5)
    in_a_child(lambda: (compute(5), in_a_child(lambda: compute(5))))
    rows = list(DataLoader(Data(), num_workers=1, multiprocessing_context="fork"))
    assert all(torch.equal(row[0], expected) for row in rows)
print("computed")
"""
    assert "computed" in finish(start(code))


# -- a thread without a core -------------------------------------------------------------------------------------------


class Stopped:
    """A thread of a child process that gets no core: ptrace stops it alone."""

    ATTACH, DETACH, ALL = 16, 17, 0x40000000  # PTRACE_ATTACH stops with SIGSTOP; __WALL

    def __init__(self, thread):
        self.thread, self.libc = thread, ctypes.CDLL(None, use_errno=True)
        self.libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self.libc.ptrace.restype = ctypes.c_long

    def __enter__(self):
        if self.libc.ptrace(self.ATTACH, self.thread, None, None):
            pytest.skip(f"threads cannot be stopped here: {os.strerror(ctypes.get_errno())}")
        os.waitpid(self.thread, self.ALL)

    def __exit__(self, *reason):
        self.libc.ptrace(self.DETACH, self.thread, None, None)


WITH_A_HELPER = """
library.sab_whose_threads(int(sys.argv[1]))
before = tasks()
compute(20)
print(*(tasks() - before), flush=True)  # the helper
sys.stdin.readline()
library.sab_whose_threads(int(sys.argv[2]))
compute(20)
print("computed", flush=True)
sys.stdin.readline()
compute(20)
print(len(tasks() - before), flush=True)
"""


def answers(process, seconds):
    return bool(select.select([process.stdout], [], [], seconds)[0])


@linux
@several_cores
def test_a_helper_without_a_core_is_not_waited_for(start):
    process = start(WITH_A_HELPER, str(OWN), str(OWN))
    (helper,) = map(int, process.stdout.readline().split())
    with Stopped(helper):
        print(file=process.stdin)
        assert answers(process, 30)
        assert process.stdout.readline() == "computed\n"
    print(file=process.stdin)
    assert finish(process).strip() == "1"  # it helps again, nobody took its place


@linux
@several_cores
def test_own_threads_help_after_openmp_s_have_waited(start):
    """Its barrier waits for a thread that is stopped for a while, once."""
    if not compiler.load_library().sab_openmp():
        pytest.skip("compiled without OpenMP")
    process = start(WITH_A_HELPER, str(OPENMP), str(FITS))
    (helper,) = map(int, process.stdout.readline().split())
    with Stopped(helper):
        print(file=process.stdin)
        assert not answers(process, 0.1)
    assert process.stdout.readline() == "computed\n"
    print(file=process.stdin)
    assert int(finish(process)) == 2
