"""Triton kernels for the hot operations of few-step image transformers.

Each operation is a sub-package `<op>/` with `naive.py`, the definition of correct in plain torch, and `triton.py`, the
fast one; `dispatch` chooses between them by device and shape, and `testing` compares them. The operations are
not written yet: until they are, everything runs on torch's own.
"""
