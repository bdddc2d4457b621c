"""The Transformers side: `SABConfig`, `SABHfQuantizer` and what differs between the supported lines.

Importing it makes the method known to Transformers.
"""

from optimum_sab.hf.auto import AutoModelForVision2Seq as AutoModelForVision2Seq
from optimum_sab.hf.config import SABConfig as SABConfig
from optimum_sab.hf.quantizer import SABHfQuantizer as SABHfQuantizer
from optimum_sab.hf.registration import register as _register

_register()
