"""The Transformers side: `SABConfig`, `SABHfQuantizer` and what differs between the supported lines.

Importing it makes the method known to Transformers. That happens while Transformers' modeling part is being imported,
by whatever imports it, processors among them: so nothing that is imported from here may import processors or auto
classes.
"""

from optimum_sab.hf.config import SABConfig as SABConfig
from optimum_sab.hf.quantizer import SABHfQuantizer as SABHfQuantizer
from optimum_sab.hf.registration import register as _register

_register()
