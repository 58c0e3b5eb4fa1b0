"""The operations on a compressed cache, one folder each: definition, reference, kernels."""
