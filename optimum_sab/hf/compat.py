"""What differs between the supported lines of Transformers."""

from __future__ import annotations

import transformers

_LINE = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# 4.57 reads tensors it offloaded to disk back as the model's float dtype, which destroys packed integers.
OFFLOADS_INTEGERS = _LINE >= (5, 0)

# What a model's forward calls its cache. From 5.24 on the old name warns; lines before it swallow the new one among
# their further arguments and compute without a cache.
CACHE_ARGUMENT = "cache" if _LINE >= (5, 24) else "past_key_values"

# Transformers 5 renames, merges and splits tensors on their way between disk and model.
RENAMES = _LINE >= (5, 0)

# 4.57 takes options of a call that loads a packed checkpoint for its own quantizers alone.
TAKES_LOAD_OPTIONS = _LINE >= (5, 0)

# 4.57 looks for a processor's files without the revision and the token that `AutoProcessor` was given.
KEEPS_ARGUMENTS = _LINE >= (5, 0)

# From 5.24 on a quantizer's layers take part in tensor parallelism with plain tensors, by a plan that names parameters.
SHARES_LAYERS = _LINE >= (5, 24)
