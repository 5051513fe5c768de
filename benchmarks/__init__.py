"""Benchmarks of mobilenet_ext against what else runs MobileNetV1: ``mobilenet-ext bench --help``."""
