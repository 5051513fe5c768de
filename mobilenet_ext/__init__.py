"""Fused depthwise-separable convolutions for PyTorch: kernels, modules, and MobileNetV1 on them."""

from mobilenet_ext import backends, flops, functional, nn  # noqa: F401  (flops registers formulas)
from mobilenet_ext.freezing import freeze
from mobilenet_ext.fusing import fuse, plain, unfuse
from mobilenet_ext.fusion_report import fusion_report
from mobilenet_ext.models import MobileNetV1

__version__ = "0.1.0"
__all__ = ["MobileNetV1", "backends", "freeze", "functional", "fuse", "fusion_report", "nn", "plain", "unfuse"]
