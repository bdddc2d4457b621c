"""Which backend computes, who decides, and what is said where the wish cannot be met."""

import os
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError, SABWarning
from optimum_sab.nn.linear import SABLinear
from optimum_sab.ops import backend_name, force_backend
from optimum_sab.ops import backends as module
from optimum_sab.ops.backends import ENVIRONMENT, choose_backend, why_not
from optimum_sab.ops.cpu import compiler
from optimum_sab.ops.verification import sample_weight

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice made, nothing verified and nothing warned of so far."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(module, "_warned", set())
    module._triton_problem.cache_clear()
    yield
    module._triton_problem.cache_clear()


@pytest.fixture
def compiler_found(monkeypatch):
    """``compiler_found(reason)``: the CPU kernel is usable, or missing for that reason."""

    def decide(reason=None):
        found = compiler.Build(None if reason else object(), reason or "compiled with cc")
        monkeypatch.setattr(compiler, "_build", lambda: found)

    decide()
    return decide


@pytest.fixture
def verified(monkeypatch):
    """``verified(problem)``: the kernels agree on every GPU, or have that problem; gives the devices looked at."""
    from optimum_sab.ops import verification

    pytest.importorskip("triton")

    def decide(problem=None):
        devices = []
        monkeypatch.setattr(verification, "disagreement", lambda device: devices.append(device) or problem)
        return devices

    return decide


def hide_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


# -- the device's own choice -------------------------------------------------------------------------------------------


def test_choice_on_the_cpu_is_the_compiled_kernel(compiler_found):
    assert choose_backend(CPU).name == "cpu"
    assert backend_name(CPU) == backend_name(CPU, "auto") == "cpu"


def test_choice_on_the_cpu_is_never_triton_by_itself(compiler_found, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    compiler_found("no C compiler")
    assert choose_backend(CPU).name == "reference"


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "xpu"])
def test_choice_on_an_accelerator_is_triton_once_it_agrees(verified, device):
    devices = verified(None)
    assert {choose_backend(torch.device(device)).name for _ in range(3)} == {"triton"}
    assert devices == [torch.device(device)]  # verified once, not at every call


def test_choice_on_an_accelerator_that_disagrees_is_the_reference_with_the_reason(verified):
    verified("the Triton kernels are wrong on it (relative error 0.3 with 3 tokens)")
    choice = choose_backend(CUDA)
    assert choice.name == "reference"
    assert "relative error 0.3" in choice.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_choice_on_a_gpu_that_is_not_there_is_the_reference_and_does_not_raise():
    pytest.importorskip("triton")
    choice = choose_backend(CUDA)
    assert choice.name == "reference"
    assert "do not run" in choice.reason


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_choice_on_other_devices_is_the_reference(device):
    pytest.importorskip("triton")
    choice = choose_backend(torch.device(device))
    assert choice.name == "reference"
    assert f"no kernels for {device}" in choice.reason


def test_interpreted_kernels_are_verified_too(verified, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    devices = verified("the Triton kernels are wrong on it (relative error 1e+10 with 24 tokens)")
    assert why_not("triton", CPU) == "the Triton kernels are wrong on it (relative error 1e+10 with 24 tokens)"
    with pytest.raises(ConfigError, match=r"asks for backend 'triton' on cpu, but the Triton kernels are wrong"):
        choose_backend(CPU, "triton")
    assert devices == [CPU]


# -- forced ------------------------------------------------------------------------------------------------------------


def test_argument_wins_over_force_backend_wins_over_the_environment(compiler_found, verified, monkeypatch):
    verified(None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert choose_backend(CPU).name == "reference"
    assert ENVIRONMENT in choose_backend(CPU).reason
    with force_backend("triton"):
        assert choose_backend(CPU).name == "triton"
        assert "force_backend" in choose_backend(CPU).reason
        assert choose_backend(CPU, "cpu").name == "cpu"
        assert choose_backend(CPU, "auto").name == "triton"
    assert choose_backend(CPU, "cpu").name == "cpu"
    assert "backend='cpu'" in choose_backend(CPU, "cpu").reason


@pytest.mark.parametrize("nothing", [None, "auto", ""])
def test_auto_and_nothing_leave_the_choice_to_the_next_in_line(compiler_found, monkeypatch, nothing):
    if nothing is not None:
        monkeypatch.setenv(ENVIRONMENT, nothing)
    with force_backend(nothing):
        assert choose_backend(CPU, nothing).name == "cpu"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    with force_backend(nothing):
        assert choose_backend(CPU, nothing).name == "reference"


@pytest.mark.parametrize("name", ["Triton", "gpu", "torch", " "])
def test_unknown_name_is_refused_with_the_known_ones(monkeypatch, name):
    expected = rf"'{name}' is no backend; use one of auto, triton, cpu, reference"
    with pytest.raises(ConfigError, match=f"backend={expected}"):
        choose_backend(CPU, name)
    with pytest.raises(ConfigError, match=f"force_backend={expected}"):
        with force_backend(name):
            pass
    monkeypatch.setenv(ENVIRONMENT, name)
    with pytest.raises(ConfigError, match=f"{ENVIRONMENT}={expected}"):
        choose_backend(CPU)


def test_unknown_name_of_an_argument_leaves_no_force_behind(compiler_found):
    with pytest.raises(ConfigError):
        with force_backend("gpu"):
            pass
    assert choose_backend(CPU).name == "cpu"


def test_forced_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"backend='triton' asks for backend 'triton' on cpu.*TRITON_INTERPRET=1"):
        choose_backend(CPU, "triton")
    with force_backend("triton"), pytest.raises(ConfigError, match="force_backend asks for"):
        choose_backend(CPU)
    monkeypatch.setenv(ENVIRONMENT, "triton")
    with pytest.raises(ConfigError, match=f"{ENVIRONMENT} asks for"):
        choose_backend(CPU)


def test_forced_cpu_on_an_accelerator_is_refused():
    with pytest.raises(ConfigError, match="'cpu' on cuda, but it computes on the CPU only"):
        choose_backend(CUDA, "cpu")


def test_forced_cpu_without_a_compiler_is_refused_with_the_reason(compiler_found):
    compiler_found("no C compiler, none of cc, gcc, clang is on the path")
    with pytest.raises(ConfigError, match="'cpu' on cpu, but no C compiler, none of cc"):
        choose_backend(CPU, "cpu")


def test_forced_triton_that_cannot_be_imported_is_refused_with_the_remedy(monkeypatch):
    hide_triton(monkeypatch)
    with pytest.raises(ConfigError, match=r"triton cannot be imported .*pip install triton"):
        choose_backend(CUDA, "triton")


def test_forced_triton_that_is_wrong_is_refused_with_the_reason(verified):
    verified("the Triton kernels are wrong on it")
    with pytest.raises(ConfigError, match="'triton' on cuda, but the Triton kernels are wrong on it"):
        choose_backend(CUDA, "triton")


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
def test_reference_can_always_be_used(device):
    assert why_not("reference", torch.device(device)) is None
    assert choose_backend(torch.device(device), "reference").name == "reference"


def test_force_backend_is_restored_level_by_level(compiler_found):
    with force_backend("reference"):
        with force_backend("cpu"):
            assert choose_backend(CPU).name == "cpu"
            with force_backend(None):
                assert choose_backend(CPU).reason == "compiled C kernels"
            assert "forced" in choose_backend(CPU).reason
        assert choose_backend(CPU).name == "reference"
        with pytest.raises(ZeroDivisionError):
            with force_backend("cpu"):
                1 / 0
        assert choose_backend(CPU).name == "reference"
    assert choose_backend(CPU).reason == "compiled C kernels"


def test_force_backend_holds_for_its_own_thread_only(compiler_found):
    found = []
    with force_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(choose_backend(CPU).name))
        thread.start()
        thread.join()
    assert found == ["cpu"]


# -- warnings ----------------------------------------------------------------------------------------------------------


def warned(recorded):
    return [str(w.message) for w in recorded if issubclass(w.category, SABWarning)]


def test_missing_compiler_warns_once_and_computes_rightly(compiler_found):
    compiler_found("no C compiler, none of cc, gcc, clang is on the path")
    layers = [SABLinear.from_packed(sample_weight(LayerSettings(), 8, rows)) for rows in (70, 90)]
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        for layer in (*layers, *layers):
            x = torch.randn(3, layer.in_features)
            torch.testing.assert_close(layer(x), x @ layer.packed.dequantize().T)
    (message,) = warned(recorded)
    assert "on cpu" in message and "slow reference" in message and "none of cc, gcc, clang" in message


def test_missing_triton_warns_once_per_reason(monkeypatch):
    hide_triton(monkeypatch)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        assert {backend_name(CUDA) for _ in range(4)} == {"reference"}
    (message,) = warned(recorded)
    assert "on cuda" in message and "pip install triton" in message


@pytest.mark.parametrize("origin", ["argument", "block", "environment"])
def test_reference_that_was_asked_for_does_not_warn(compiler_found, monkeypatch, origin):
    compiler_found("no C compiler")
    if origin == "environment":
        monkeypatch.setenv(ENVIRONMENT, "reference")
    with warnings.catch_warnings(), force_backend("reference" if origin == "block" else None):
        warnings.simplefilter("error")
        assert backend_name(CPU, "reference" if origin == "argument" else None) == "reference"


def test_usable_backend_does_not_warn(compiler_found):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_name(CPU) == "cpu"


# -- a machine without any of it ---------------------------------------------------------------------------------------


def test_package_works_where_there_is_neither_triton_nor_a_compiler(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        import warnings

        sys.modules["triton"] = None
        warnings.simplefilter("always")
        with warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            import torch
            import optimum_sab
            from optimum_sab import SABLinear
            from optimum_sab.core.settings import LayerSettings
            from optimum_sab.nn.input_group import group_linears
            from optimum_sab.ops.verification import sample_weight

            model = torch.nn.Sequential(*(SABLinear.from_packed(sample_weight(LayerSettings(), 96, 96)) for _ in "ab"))
            for layer in model:
                layer.prepare()
            group_linears(model)
            x = torch.randn(3, 96)
            for _ in range(2):
                y = model(x)
        expected = x @ model[0].packed.dequantize().T @ model[1].packed.dequantize().T
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert "sab_kernels" not in sys.modules
        messages = [str(w.message) for w in recorded if w.category.__name__ == "SABWarning"]
        assert len(messages) == 1 and "no C compiler" in messages[0], messages
        print("computed")
        """
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", ENVIRONMENT)}
    environment |= {"PATH": str(tmp_path), "OPTIMUM_SAB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and "computed" in done.stdout, done.stderr[-3000:]
