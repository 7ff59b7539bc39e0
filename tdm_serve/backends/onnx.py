"""Exported graphs in ONNX Runtime, on a CPU or an NVIDIA GPU, without copies between torch and the runtime.

`onnx` takes the provider of the device; `onnx-cpu`, `onnx-cuda` and `onnx-tensorrt` name one, which must be there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdm_serve.artifact import Artifact
from tdm_serve.backends.base import Denoise
from tdm_serve.backends.exported import as_backend
from tdm_serve.errors import ArtifactError, BackendUnavailable, MissingExtra

PROVIDERS = {
    "onnx-cpu": "CPUExecutionProvider",
    "onnx-cuda": "CUDAExecutionProvider",
    "onnx-tensorrt": "TensorrtExecutionProvider",
}
TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}
ELEMENTS = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}  # onnx.TensorProto's numbers


def create(denoiser: nn.Module) -> Denoise:
    """An exported denoiser is a backend by itself."""
    return as_backend(denoiser, "onnx")


class OnnxParts:
    """The graphs of an engine's folder as open sessions."""

    exact_on_cpu: bool

    def __init__(self, folder: Path, artifact: Artifact, device: torch.device, backend: str) -> None:
        """Raises BackendUnavailable where the provider is absent, ArtifactError for a graph that cannot be opened."""
        self._device = device
        provider = pick_provider(backend, device)
        self._sessions = {
            name: _session(folder / facts[0].name, provider, device) for name, facts in artifact.parts.items()
        }
        # int8 activations are scaled by the largest number of a whole batch
        self.exact_on_cpu = artifact.quantise == "none"

    def run(self, part: str, inputs: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """The output of one graph. `shape` is the output's; -1 is a width that the graph knows."""
        session = self._sessions[part]
        declared: list[Any] = session.get_outputs()[0].shape
        sizes = [known if size < 0 else size for size, known in zip(shape, declared, strict=True)]
        binding = session.io_binding()
        held = [tensor.contiguous() for tensor in inputs.values()]  # alive until the graph has run
        for name, tensor in zip(inputs, held, strict=True):
            self._bind(binding.bind_input, name, tensor)
        [result] = session.get_outputs()
        output = torch.empty(sizes, dtype=TYPES[result.type], device=self._device)
        self._bind(binding.bind_output, result.name, output)
        session.run_with_iobinding(binding)
        return output

    def _bind(self, bind: Any, name: str, tensor: Tensor) -> None:
        bind(
            name,
            self._device.type,
            self._device.index or 0,
            ELEMENTS[tensor.dtype],
            tuple(tensor.shape),
            tensor.data_ptr(),
        )


def pick_provider(backend: str, device: torch.device) -> str:
    """Which execution provider runs `backend` on a device. Raises BackendUnavailable or MissingExtra."""
    provider = PROVIDERS[f"onnx-{device.type}" if backend == "onnx" else backend]
    if (provider == PROVIDERS["onnx-cpu"]) != (device.type == "cpu"):
        raise BackendUnavailable(f"backend {backend!r} does not go with device {device.type!r}; choose --device to fit")
    available = _available()
    if provider not in available:
        hint = "pip uninstall onnxruntime, then pip install 'tdm-serve[onnx-gpu]'"
        if provider == PROVIDERS["onnx-tensorrt"]:
            hint += ", and NVIDIA's TensorRT libraries (libnvinfer) for it"
        raise BackendUnavailable(
            f"backend {backend!r} needs {provider}, and this ONNX Runtime has only {', '.join(available)}; run: {hint}"
        )
    return provider


def _available() -> list[str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("backend 'onnx'", "onnx") from error
    return list(onnxruntime.get_available_providers())


def _session(path: Path, provider: str, device: torch.device) -> Any:
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # as torch's own threads: whether workers spin between operations is the user's OpenMP policy
    spins = "0" if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" else "1"
    options.add_session_config_entry("session.intra_op.allow_spinning", spins)
    options.log_severity_level = 3  # errors
    try:
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=[_with_settings(provider, device)])
    except Exception as error:
        raise ArtifactError(f"{path} cannot be opened by ONNX Runtime {onnxruntime.__version__}: {error}") from error
    if session.get_providers()[0] != provider:  # it falls back by itself where libraries are missing
        raise BackendUnavailable(
            f"{provider} was asked for, but ONNX Runtime could not load it and took {session.get_providers()[0]}; "
            "check that its CUDA and cuDNN versions are installed"
        )
    return session


def _with_settings(provider: str, device: torch.device) -> Any:
    if device.type == "cpu":
        return provider
    stream = str(torch.cuda.current_stream(device).cuda_stream)  # so that nothing waits for another stream
    return provider, {"device_id": str(device.index or 0), "user_compute_stream": stream}


def open_parts(folder: Path, artifact: Artifact, device: torch.device, backend: str) -> OnnxParts:
    """All graphs of an engine."""
    return OnnxParts(folder, artifact, device, backend)
