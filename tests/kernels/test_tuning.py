"""Launch settings: what they may be, where they come from, and what is remembered of measurements."""

import json
import os
from dataclasses import asdict, fields

import pytest
import torch

pytest.importorskip("triton")
from sab_kernels import Launch
from sab_kernels.geometry import Geometry
from sab_kernels.tuning import (
    CACHE,
    CONFIGS,
    LaunchCache,
    candidates,
    default_launch,
    expert_candidates,
    launch_cache,
    settings_key,
)

TABLE = json.loads((CONFIGS / "devices.json").read_text(encoding="utf-8"))
NAMES = {field.name for field in fields(Launch)}
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(name, major, minor)``: what the CUDA device says it is."""

    def pretend(name, major=0, minor=0):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        default_launch.cache_clear()
        launch_cache.cache_clear()

    yield pretend
    default_launch.cache_clear()
    launch_cache.cache_clear()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decode_tokens", -1),
        ("decode_tokens", 9),
        ("decode_tiles", 0),
        ("decode_tiles", 3),
        ("decode_programs", 0),
        ("decode_unroll", 0),
        ("batch_warps", 3),
        ("batch_warps", 16),
        ("batch_tokens", 8),
        ("batch_tokens", 48),
        ("batch_programs", 0),
        ("batch_stages", 0),
        ("dense_tokens", 0),
        ("dense_bytes", (1 << 20) - 1),
        ("batch_warps", "4"),
        ("expert_single", -1),
        ("expert_decode", 65),
        ("expert_tokens", 128),
    ],
)
def test_launch_refuses_a_value_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} "):
        Launch(**{name: value})


def test_launch_refuses_an_unknown_setting():
    with pytest.raises(TypeError, match="decode_warps"):
        Launch(decode_warps=1)


@pytest.mark.parametrize(
    ("group", "key"), [(group, key) for group in ("names", "capabilities") for key in TABLE[group]]
)
def test_device_table_has_valid_settings_only(group, key):
    entry = TABLE[group][key]
    settings = {name: value for name, value in entry.items() if name != "measured"}
    assert settings.keys() <= NAMES
    assert isinstance(entry["measured"], bool)
    Launch(**settings)


@pytest.mark.parametrize("key", TABLE["names"])
def test_default_launch_is_the_table_s_by_name(gpu, key):
    gpu(f"NVIDIA {key.lower()} 80GB HBM3", 7, 5)
    settings = {name: value for name, value in TABLE["names"][key].items() if name in NAMES}
    assert default_launch(DEVICE) == Launch(**settings)


@pytest.mark.parametrize("key", TABLE["capabilities"])
def test_default_launch_is_the_table_s_by_capability(gpu, key):
    gpu("Some Accelerator", *map(int, key.split(".")))
    settings = {name: value for name, value in TABLE["capabilities"][key].items() if name in NAMES}
    assert default_launch(DEVICE) == Launch(**settings)


def test_default_launch_of_an_unknown_device_is_the_class_s(gpu):
    gpu("Some Accelerator", 7, 5)
    assert default_launch(DEVICE) == Launch()


def test_default_launch_prefers_the_longest_name(gpu, monkeypatch, tmp_path):
    names = {"H1": {"batch_warps": 1}, "H100 PCIe": {"batch_warps": 2}, "H100": {"batch_warps": 8}}
    table = {"names": names, "capabilities": {"9.0": {"batch_warps": 4}}}
    (tmp_path / "devices.json").write_text(json.dumps(table))
    monkeypatch.setattr("sab_kernels.tuning.CONFIGS", tmp_path)
    for name, warps in [("NVIDIA H100 PCIe", 2), ("NVIDIA H100 NVL", 8), ("NVIDIA H10", 1), ("NVIDIA GH200", 4)]:
        gpu(name, 9, 0)
        assert default_launch(DEVICE).batch_warps == warps


@pytest.fixture
def cache(tmp_path):
    return LaunchCache(tmp_path / "folder" / "device.json")


SPEED = {Launch(batch_warps=2): 3.0, Launch(batch_warps=4): 1.0, Launch(batch_warps=8): 2.0}


def test_launch_cache_picks_the_fastest(cache):
    assert cache.measured("key", SPEED, SPEED.__getitem__) == Launch(batch_warps=4)


def test_launch_cache_measures_a_key_once(cache):
    timed = []

    def time(launch):
        timed.append(launch)
        return SPEED[launch]

    first = cache.measured("key", SPEED, time)
    assert timed == list(SPEED)
    assert cache.measured("key", [Launch()], time) == first
    assert timed == list(SPEED)
    assert cache.measured("other", [Launch(batch_warps=8)], time) == Launch(batch_warps=8)


def test_launch_cache_reads_back_what_was_written(cache):
    cache.measured("one", SPEED, SPEED.__getitem__)
    cache.measured("two", [Launch(batch_warps=8)], SPEED.__getitem__)
    again = LaunchCache(cache.path)
    assert again.entries == {"one": Launch(batch_warps=4), "two": Launch(batch_warps=8)}
    assert again.measured("one", (), SPEED.__getitem__) == Launch(batch_warps=4)
    stored = json.loads(cache.path.read_text(encoding="utf-8"))
    assert stored["one"] == asdict(Launch(batch_warps=4))


def test_launch_cache_replaces_its_file_whole(cache, monkeypatch):
    """Another process reads the old file or the new one, and a write that breaks off leaves the old one."""
    cache.measured("one", SPEED, SPEED.__getitem__)
    before = cache.path.read_text(encoding="utf-8")
    replace, seen = type(cache.path).replace, []

    def look(partial, target):
        assert partial.parent == cache.path.parent and str(os.getpid()) in partial.name
        assert json.loads(partial.read_text(encoding="utf-8")).keys() == {"one", "two"}
        seen.append(cache.path.read_text(encoding="utf-8"))
        return replace(partial, target)

    monkeypatch.setattr(type(cache.path), "replace", look)
    cache.measured("two", SPEED, SPEED.__getitem__)
    assert seen == [before]
    assert LaunchCache(cache.path).entries.keys() == {"one", "two"}
    assert [p.name for p in cache.path.parent.iterdir()] == [cache.path.name]


def test_launch_cache_is_a_file_of_the_device_and_the_triton_version(gpu, monkeypatch, tmp_path):
    import triton

    gpu("NVIDIA H100 80GB/HBM3", 9, 0)
    monkeypatch.setenv(CACHE, str(tmp_path))
    assert launch_cache(DEVICE).path == tmp_path / f"NVIDIA_H100_80GB_HBM3-triton-{triton.__version__}.json"
    assert launch_cache(DEVICE) is launch_cache(DEVICE)


@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 65, 300, 5000])
@pytest.mark.parametrize("launch", [Launch(), Launch(decode_tokens=4, dense_tokens=100)])
def test_candidates_run_for_the_tokens_they_are_tried_for(tokens, launch):
    """All of one kind up to ``decode_tokens``; above it small batches, for many tokens dense products too."""
    from sab_kernels.linear import regime

    found = candidates(tokens, launch)
    assert len(set(found)) == len(found) > 1
    kinds = [regime(tokens, torch.float16, candidate) for candidate in found]
    if tokens <= launch.decode_tokens:
        assert set(kinds) == {"decode"}
    elif tokens <= 64:
        assert set(kinds) == {"small_batch"}
    else:
        assert set(kinds) == {"small_batch", "dense"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("pairs", "most"), [(8, 1), (128, 1), (129, 4), (256, 4), (512, 8), (1025, 16), (20000, 64)])
def test_expert_candidates_are_of_every_way_that_is_sensible(dtype, pairs, most):
    from sab_kernels.experts import expert_way

    found = expert_candidates(pairs, 128, dtype, Launch())
    assert len(set(found)) == len(found) > 1
    ways = {expert_way(pairs, 128, dtype, candidate) for candidate in found}
    assert any(way == "batch" for way, _ in ways)
    if dtype == torch.float32:
        assert ways == {("batch", 16)}
    else:
        assert max(size for _, size in ways) >= most
        assert (("decode", 1) in ways) == (pairs <= 512) and any(w == "decode" for w, _ in ways) == (pairs <= 1024)


def test_settings_key_tells_shapes_codes_and_numbers_of_tokens_apart():
    geometry = Geometry(32, 64, 128, 1, 1, 8, 8, True)
    coded = Geometry(32, 64, 128, 1, 1, 8, 8, True, (0b11, 0b1))
    keys = [settings_key(tokens, geometry, torch.float16) for tokens in (1, 7, 8, 9, 17)]
    keys += [settings_key(1, coded, torch.float16), settings_key(1, geometry, torch.float32)]
    assert len(set(keys)) == len(keys)
    assert settings_key(16, geometry, torch.float16) == settings_key(9, geometry, torch.float16)
