"""Attention of int8 queries and keys with values in fp8 or 16 bits."""

from tdm_kernels.quantised.ops import quantise_values, quantised_attention

__all__ = ["quantise_values", "quantised_attention"]
