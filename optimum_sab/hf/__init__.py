"""The Transformers side: `SABConfig`, `SABHfQuantizer` and what differs between the supported lines."""

from optimum_sab.hf.auto import AutoModelForVision2Seq as AutoModelForVision2Seq
from optimum_sab.hf.config import SABConfig as SABConfig
from optimum_sab.hf.quantizer import SABHfQuantizer as SABHfQuantizer
