"""Which model families the library binarizes: each built small and random, quantized, saved, reloaded and compared."""
