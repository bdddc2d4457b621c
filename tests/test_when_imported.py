"""The plugin is known to Transformers whatever is imported first, and importing it costs nothing."""

import subprocess
import sys
import textwrap

import pytest

from optimum_sab.when_imported import when_imported

KNOWN = (
    "from transformers.quantizers import auto; assert auto.AUTO_QUANTIZER_MAPPING['sab'].__name__ == 'SABHfQuantizer'"
)


def run(script):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.compat
@pytest.mark.parametrize(
    "imports",
    [
        "import optimum_sab, transformers; transformers.AutoModelForCausalLM.from_pretrained",
        "import transformers; transformers.PreTrainedModel; import optimum_sab",
        "import transformers, optimum_sab; from transformers import LlamaForCausalLM",
        "import optimum_sab; from transformers.models.llama.modeling_llama import LlamaForCausalLM",
        "import optimum_sab; from transformers.quantizers.base import HfQuantizer; import transformers.modeling_utils",
        "from optimum_sab import SABConfig; SABConfig(); import transformers.modeling_utils",
        "from optimum_sab.nn.linear import SABLinear; import transformers.modeling_utils",
    ],
)
def test_transformers_knows_the_method_in_every_order(imports):
    run(f"{imports}\n{KNOWN}")


def test_importing_the_package_imports_neither_torch_nor_transformers():
    run("import sys, optimum_sab; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")


def test_public_names_are_there():
    run(
        """
        import optimum_sab
        assert {"SABConfig", "SABLinear", "SABHfQuantizer", "AutoModelForVision2Seq"} <= set(dir(optimum_sab))
        for name in optimum_sab.__all__:
            getattr(optimum_sab, name)
        try:
            optimum_sab.SABConfg
        except AttributeError as error:
            assert "SABConfg" in str(error)
        else:
            raise AssertionError
        """
    )


def test_the_module_is_as_without_being_waited_for(tmp_path, monkeypatch):
    (tmp_path / "awaited_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    called, before = [], list(sys.meta_path)
    when_imported("awaited_module", lambda: called.append(sys.modules["awaited_module"].value))
    import json  # noqa: F401  another module does not count

    assert called == []
    import awaited_module

    assert called == [1]
    assert sys.meta_path == before
    assert awaited_module.__spec__.loader is awaited_module.__loader__
    assert awaited_module.__loader__.get_source("awaited_module") == "value = 1\n"
    when_imported("awaited_module", lambda: called.append(2))
    assert called == [1, 2]
    del sys.modules["awaited_module"]


def test_what_is_never_found_is_an_import_error_as_ever():
    when_imported("no_such_module_anywhere", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        import no_such_module_anywhere  # noqa: F401
