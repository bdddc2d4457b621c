"""Gradient refinement of what is continuous in a binarized model: scales, norms and biases. Signs stay as solved."""
