"""Make Transformers know the method; importing the package does it, any number of times."""

from __future__ import annotations

from transformers.quantizers import auto

from optimum_sab.hf import counting, from_config, saving, streaming
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.hub import companions
from optimum_sab.hf.quantizer import SABHfQuantizer
from optimum_sab.version import QUANT_METHOD


def register() -> None:
    """Register `SABConfig` and `SABHfQuantizer` under "sab". Doing it again replaces them with the current classes.

    The mappings are written directly because Transformers' decorators refuse a name they know, which would make a
    reload of this package fail.
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SABConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SABHfQuantizer
    loading = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)  # Transformers 5: load-time options
    if loading is not None and SABConfig not in loading:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*loading, SABConfig)
    for each in (saving, counting, from_config, streaming, companions):
        each.install()
