"""PEFT and this package may be imported in any order, PEFT may be missing, and is never imported by us."""

import subprocess
import sys
import threading
import time
import types

import pytest

from optimum_sab.after_import import after_import
from optimum_sab.errors import SABWarning
from optimum_sab.hf.adapters import install as module

peft = pytest.importorskip("peft")

SHOW = """
import peft.tuners.tuners_utils as found, peft.utils.integrations as other
assert hasattr(found.BaseTuner.inject_adapter, "_without_packed_layers")
assert hasattr(other.dequantize_module_weight, "_without_packed_layers")
assert hasattr(peft.prepare_model_for_kbit_training, "_without_packed_layers")
"""
ORDERS = {
    "ours first": "import sys, importlib.util\nimport optimum_sab\n"
    "assert 'peft' not in sys.modules and importlib.util.find_spec('peft')\n"
    f"from peft.tuners.lora import LoraConfig\nimport peft\n{SHOW}",
    "theirs first, and a name taken": "import peft\nfrom peft import prepare_model_for_kbit_training\n"
    f"import optimum_sab\n{SHOW}\nassert prepare_model_for_kbit_training is peft.prepare_model_for_kbit_training",
}


@pytest.mark.parametrize("order", ORDERS)
def test_peft_knows_packed_layers_in_any_order(order, bare_python):
    done = subprocess.run([bare_python, "-c", ORDERS[order]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of its own name, that counts how often it is run."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    name = "a_package_to_await"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    yield name
    sys.modules.pop(name, None)


def test_action_runs_when_the_package_is_imported_and_sees_all_of_it(package):
    seen = []
    after_import(package, lambda: seen.append(sys.modules[package].value))
    assert seen == []
    __import__(package)
    __import__(package)
    assert seen == [1]


def test_action_runs_at_once_for_a_package_that_is_there(package):
    __import__(package)
    seen = []
    after_import(package, lambda: seen.append(1))
    assert seen == [1]


def test_action_waits_for_another_thread_that_imports_the_package(package, tmp_path):
    (tmp_path / f"{package}.py").write_text("import time\ntime.sleep(0.3)\nvalue = 1\n")
    importing = threading.Thread(target=__import__, args=(package,))
    importing.start()
    while package not in sys.modules:
        time.sleep(0.001)
    seen = []
    after_import(package, lambda: seen.append(sys.modules[package].value))
    importing.join()
    assert seen == [1]


def test_action_waits_where_importing_is_forbidden(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    after_import(package, lambda: pytest.fail("ran"))


def test_second_action_takes_the_place_of_the_first(package):
    seen = []
    after_import(package, lambda: seen.append("first"))
    after_import(package, lambda: seen.append("second"))
    __import__(package)
    assert seen == ["second"]


def test_package_that_is_not_there_stays_a_plain_error(package):
    after_import("no_such_package_at_all", lambda: pytest.fail("ran"))
    with pytest.raises(ModuleNotFoundError):
        __import__("no_such_package_at_all")


def test_error_of_the_package_is_its_own(package, tmp_path):
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('mine')\n")
    after_import(package, lambda: pytest.fail("ran"))
    with pytest.raises(RuntimeError, match="mine"):
        __import__(package)


def test_doing_it_twice_leaves_one_layer_of_ours():
    from peft.tuners.tuners_utils import BaseTuner

    first = BaseTuner.inject_adapter._without_packed_layers
    module.install()
    module.install()
    assert BaseTuner.inject_adapter._without_packed_layers is first
    assert not hasattr(first, "_without_packed_layers")


def test_release_of_peft_that_is_built_otherwise_is_left_alone_with_a_warning(monkeypatch):
    from peft.utils import integrations

    before = integrations.dequantize_module_weight
    other = types.SimpleNamespace(Place=None, places=lambda: (_ for _ in ()).throw(AttributeError("no such function")))
    monkeypatch.setitem(sys.modules, "optimum_sab.hf.adapters.around", other)
    with pytest.warns(SABWarning, match=r"PEFT .* cannot adapt packed layers \(no such function\); install peft>=0.21"):
        module.install()
    assert integrations.dequantize_module_weight is before
