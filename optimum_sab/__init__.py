"""optimum-sab: significance-aware binarization of vision-language models, inside Transformers' `from_pretrained`.

Importing the package registers the quantization method "sab" with Transformers, which is what makes both of these
work::

    model = AutoModelForImageTextToText.from_pretrained("org/vlm", quantization_config=SABConfig())
    model = AutoModelForImageTextToText.from_pretrained("me/vlm-sab")

It imports neither torch nor Transformers before they are needed: what Transformers and PEFT are to know they are told
once they are imported, by whomever.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from optimum_sab.after_import import after_import
from optimum_sab.version import __version__ as __version__

if TYPE_CHECKING:
    from optimum_sab.hf.auto import AutoModelForVision2Seq as AutoModelForVision2Seq
    from optimum_sab.hf.config import SABConfig as SABConfig
    from optimum_sab.hf.quantizer import SABHfQuantizer as SABHfQuantizer
    from optimum_sab.nn.linear import SABLinear as SABLinear

_PUBLIC = {
    "AutoModelForVision2Seq": "optimum_sab.hf.auto",
    "SABConfig": "optimum_sab.hf.config",
    "SABHfQuantizer": "optimum_sab.hf.quantizer",
    "SABLinear": "optimum_sab.nn.linear",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def _register() -> None:
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or hasattr(modeling, "PreTrainedModel"):  # else it is being imported, and we are called again
        importlib.import_module("optimum_sab.hf")  # registers when all of it is there: it may be what imports just now


def _adapt() -> None:
    importlib.import_module("optimum_sab.hf.adapters.install").install()


after_import("transformers.quantizers", _register)
after_import("transformers.modeling_utils", _register)
after_import("peft", _adapt)
