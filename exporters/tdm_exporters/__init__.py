"""Exports a checkpoint, adapter fused, to ONNX, ONNX Runtime, TensorRT and compiled packages.

Every export is compared with eager execution before it gets its final name, and is accompanied by the manifest that the
runtime checks. The exporters are not written yet; `tdm-serve export` checks its options and says so.
"""
