"""A decoder block's linears are binarized."""
