"""A network between ranks that is cut in the middle: two network namespaces of Linux, and a cable between them."""

import os
import shutil
import subprocess
import threading
import time

import pytest

from optimum_sab.calibration.joining import TIMEOUT
from optimum_sab.calibration.last_words import LAST_WORDS, last_words
from optimum_sab.errors import RankError
from tests.calibration import rank_work
from tests.calibration.ranked import Server

TOOLS = ("unshare", "nsenter", "ip")
WAIT = 3  # seconds that a rank is waited for


def ip(network, *command):
    subprocess.run(["nsenter", "--target", str(network), "--net", "ip", *command], check=True)


def namespaces():
    """Whether this process may make networks of its own."""
    if getattr(os, "geteuid", lambda: 1)() or not all(map(shutil.which, TOOLS)):
        return False
    made = subprocess.run(["unshare", "--net", "ip", "link", "add", "sab0", "type", "veth"], capture_output=True)
    return made.returncode == 0


@pytest.fixture
def networks():
    """Processes, each in a network of its own, which a cable joins."""
    if not namespaces():
        pytest.skip("needs root and iproute2 on Linux")
    processes = [subprocess.Popen(["unshare", "--net", "sleep", "100"]) for _ in rank_work.ENDS]
    own = os.readlink("/proc/self/ns/net")
    while any(os.readlink(f"/proc/{each.pid}/ns/net") == own for each in processes):
        time.sleep(0.01)
    pids = [each.pid for each in processes]
    ip(pids[0], "link", "add", "sab0", "type", "veth", "peer", "name", "sab1", "netns", str(pids[1]))
    for end, (pid, address) in enumerate(zip(pids, rank_work.ENDS, strict=True)):
        ip(pid, "addr", "add", f"{address}/24", "dev", f"sab{end}")
        for device in ("lo", f"sab{end}"):
            ip(pid, "link", "set", device, "up")
    yield pids
    for each in processes:
        each.kill()
        each.wait()


@pytest.fixture
def server(warm):
    found = Server(warm / "python")
    yield found
    found.close()


def test_both_ends_of_a_network_that_is_cut_stop_in_time(server, networks, tmp_path):
    """The one whose store is at the other end too, though that answers nothing any more."""
    cut = []

    def cut_when_going():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        ip(networks[0], "link", "set", "sab0", "down")
        cut.append(time.monotonic())

    began = time.monotonic()
    cutting = threading.Thread(target=cut_when_going, daemon=True)
    cutting.start()
    outcomes = server.run(2, rank_work.over_a_cable, networks, tmp_path, environment={TIMEOUT: str(WAIT)})
    cutting.join(5)
    for other, each in enumerate(reversed(outcomes)):
        assert isinstance(each.error, RankError), each.error
        assert str(each.error).startswith(f"rank {other} of 2 does not answer") and "network" in str(each.error)
        assert each.seconds - (cut[0] - began) < WAIT + LAST_WORDS + 4


class Store:
    """Of this process alone, with what other ranks have left there."""

    def __init__(self, **left):
        self.left = {name.replace("_", "/"): words for name, words in left.items()}

    def set(self, name, words):
        self.left[name] = words

    def check(self, names):
        return all(name in self.left for name in names)

    def get(self, name):
        return self.left[name].encode()


def test_last_words_are_of_those_that_are_still_there():
    began = time.monotonic()
    store = Store(gone_0="", gone_3="ValueError: no")
    assert last_words(store, 1, 4) == ([2], (3, "ValueError: no"))
    assert LAST_WORDS <= time.monotonic() - began < LAST_WORDS + 1
    assert store.left["gone/1"] == ""
    assert last_words(Store(gone_0="", gone_2=""), 1, 3) == ([], None)


def test_a_store_that_is_gone_was_held_by_the_first_rank():
    class Gone(Store):
        def check(self, names):
            raise RuntimeError("Connection reset by peer")

    assert last_words(Gone(), 2, 3) == ([0], None)


def test_a_store_that_never_answers_is_not_waited_for():
    ever = threading.Event()

    class Silent(Store):
        def check(self, names):
            ever.wait()

    began = time.monotonic()
    assert last_words(Silent(), 1, 3) == ([0, 2], None)
    assert time.monotonic() - began < LAST_WORDS + 1
    ever.set()
