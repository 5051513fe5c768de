"""What runs MobileNetV1 besides mobilenet_ext, each as a small adapter; one module a framework.

A peer is imported when it is asked for, so that one which is not installed costs nothing but its row.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.peers.base import Peer

OURS = "mobilenet_ext"
CAPTURED = f"{OURS}, CUDA graph"  # the same kernels, as a user who captures them runs them
EAGER = "eager channels_last"
_CLASSES = {
    OURS: "torch_peers.MobileNetExt",
    CAPTURED: "torch_peers.MobileNetExtCaptured",
    "eager NCHW": "torch_peers.EagerNchw",
    EAGER: "torch_peers.EagerChannelsLast",
    f"{EAGER}, CUDA graph": "torch_peers.EagerCaptured",
    "torch.compile": "torch_peers.Compile",
    "torch.compile max-autotune": "torch_peers.CompileMaxAutotune",
    "torch.compile freezing": "torch_peers.CompileFreezing",
    "timm": "torch_peers.Timm",
    "ONNX Runtime": "onnx_runtime.OnnxRuntime",
    "OpenVINO": "openvino_runtime.OpenVino",
    "JAX": "jax_xla.Jax",
}
NAMES = tuple(_CLASSES)


def is_ours(runner: str) -> bool:
    """Whether a row is of this library, however it is run: ``mobilenet_ext`` or ``mobilenet_ext, HOW``."""
    return runner.split(", ")[0] == OURS


def get(name: str) -> Peer:
    module, class_ = _CLASSES[name].split(".")
    return getattr(import_module(f"benchmarks.peers.{module}"), class_)()
