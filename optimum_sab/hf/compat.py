"""What differs between the supported lines of Transformers."""

from __future__ import annotations

import transformers

# 4.57 reads tensors it offloaded to disk back as the model's float dtype, which destroys packed integers.
OFFLOADS_INTEGERS = int(transformers.__version__.split(".")[0]) >= 5
