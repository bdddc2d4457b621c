"""The plugin is known to Transformers whatever is imported first, and importing it costs nothing."""

import subprocess
import sys
import textwrap

import pytest

KNOWN = (
    "from transformers.quantizers import auto; assert auto.AUTO_QUANTIZER_MAPPING['sab'].__name__ == 'SABHfQuantizer'"
)


@pytest.fixture
def run(bare_python):
    """Runs a script in a process that has imported neither Transformers nor this package."""

    def call(script):
        done = subprocess.run([bare_python, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return call


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
        "import optimum_sab; from transformers import Qwen2_5_VLForConditionalGeneration",
        "import optimum_sab; from transformers import AutoProcessor, AutoModelForImageTextToText; "
        "from transformers.models.auto import image_processing_auto; import transformers.modeling_utils",
        "import optimum_sab; import transformers.processing_utils; import transformers.modeling_utils",
    ],
)
def test_transformers_knows_the_method_in_every_order(imports, run):
    run(f"{imports}\n{KNOWN}")


def test_importing_the_package_imports_neither_torch_nor_transformers():
    script = "import sys, optimum_sab; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there(run):
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


@pytest.mark.compat
def test_registering_imports_no_processors(run):
    """Which may be what imports Transformers' modeling part just then."""
    run(
        """
        import sys, optimum_sab, transformers.modeling_utils
        assert "optimum_sab.hf.quantizer" in sys.modules and "optimum_sab.hf.processor" not in sys.modules
        """
    )
