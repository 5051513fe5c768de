"""Networks built on the fused units."""

from mobilenet_ext.models.mobilenet_v1 import MobileNetV1

__all__ = ["MobileNetV1"]
