"""optimum-sab: significance-aware binarization of vision-language models, inside Transformers' `from_pretrained`.

Importing the package registers the quantization method "sab" with Transformers, which is what makes both of these
work::

    model = AutoModelForImageTextToText.from_pretrained("org/vlm", quantization_config=SABConfig())
    model = AutoModelForImageTextToText.from_pretrained("me/vlm-sab")
"""

from optimum_sab.hf.auto import AutoModelForVision2Seq as AutoModelForVision2Seq
from optimum_sab.hf.config import SABConfig as SABConfig
from optimum_sab.hf.quantizer import SABHfQuantizer as SABHfQuantizer
from optimum_sab.hf.registration import register as _register
from optimum_sab.nn.linear import SABLinear as SABLinear
from optimum_sab.version import __version__ as __version__

_register()
