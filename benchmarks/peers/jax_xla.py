"""The network in JAX, compiled by XLA: NHWC, jitted whole, parameters in float32 and 16-bit products for training."""

from __future__ import annotations

import os
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from benchmarks.network import CLASSES, Workload
from benchmarks.peers.base import FirstStep, Peer
from benchmarks.peers.torch_peers import LABEL_SMOOTHING, LEARNING_RATE, MOMENTUM
from mobilenet_ext import MobileNetV1

EPS, BN_MOMENTUM = 1e-5, 0.1

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other runners need memory of the GPU too


def parameters_of(model: MobileNetV1) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[int, int]]]:
    """Trainable parameters, running statistics, and (stride, groups) of each convolution."""
    params, stats, geometry = [], [], []
    for conv, norm, _ in model.feature[:-1]:
        weight = conv.weight.detach().permute(2, 3, 1, 0).numpy()  # HWIO
        params.append({"weight": weight, "gamma": norm.weight.detach().numpy(), "beta": norm.bias.detach().numpy()})
        stats.append({"mean": norm.running_mean.numpy(), "var": norm.running_var.numpy()})
        geometry.append((conv.stride[0], conv.groups))
    (linear,) = [module for module in model.classifier if isinstance(module, nn.Linear)]
    params.append({"weight": linear.weight.detach().numpy(), "beta": linear.bias.detach().numpy()})
    return params, stats, geometry


def network(params, stats, geometry, x, dtype, training):
    """Logits in float32, and the new running statistics."""
    import jax
    import jax.numpy as jnp

    new_stats = []
    x = x.astype(dtype)
    for unit, running, (stride, groups) in zip(params[:-1], stats, geometry, strict=True):
        pad = unit["weight"].shape[0] // 2
        x = jax.lax.conv_general_dilated(
            x,
            unit["weight"].astype(dtype),
            (stride, stride),
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        ).astype(jnp.float32)
        mean, var = running["mean"], running["var"]
        if training:
            count = x.size // x.shape[-1]
            mean = x.mean((0, 1, 2))
            var = jnp.square(x - mean).mean((0, 1, 2))
            new_stats.append(
                {
                    "mean": running["mean"] + BN_MOMENTUM * (mean - running["mean"]),
                    "var": running["var"] + BN_MOMENTUM * (var * count / (count - 1) - running["var"]),
                }
            )
        scale = unit["gamma"] * jax.lax.rsqrt(var + EPS)
        x = jax.nn.relu((x - mean) * scale + unit["beta"]).astype(dtype)
    features = x.astype(jnp.float32).mean((1, 2)).astype(dtype)
    logits = features @ params[-1]["weight"].T.astype(dtype) + params[-1]["beta"].astype(dtype)
    return logits.astype(jnp.float32), new_stats


def jax_as_torch() -> Any:
    """The module, set to multiply float32 as PyTorch is set to: on a GPU its own default is TF32."""
    import jax

    ieee = torch.backends.cudnn.conv.fp32_precision == "ieee"
    jax.config.update("jax_default_matmul_precision", "highest" if ieee else "default")
    return jax


class Inference:
    def __init__(self, work: Workload) -> None:
        self.jax = jax = jax_as_torch()
        params, stats, geometry = parameters_of(work.model().cpu())
        # The weights are constants of the compiled program: XLA folds what it can.
        self.run = jax.jit(lambda x: network(params, stats, geometry, x, work.dtype, False)[0])
        self.images = jax.device_put(work.images().cpu().permute(0, 2, 3, 1).contiguous().numpy())

    def __call__(self) -> object:
        self.output = self.jax.block_until_ready(self.run(self.images))
        return self.output

    def logits(self) -> Tensor:
        return torch.from_numpy(numpy.array(self.output))


class Training:
    def __init__(self, work: Workload) -> None:
        import jax.numpy as jnp

        self.jax = jax = jax_as_torch()
        params, stats, geometry = parameters_of(work.model().cpu())
        self.params, self.stats = jax.device_put(params), jax.device_put(stats)
        self.velocity = jax.tree.map(jnp.zeros_like, self.params)
        self.images = jax.device_put(work.images().cpu().permute(0, 2, 3, 1).contiguous().numpy())
        self.labels = jax.device_put(work.labels().cpu().numpy())

        def loss_of(params, stats, x, labels):
            logits, stats = network(params, stats, geometry, x, work.dtype, True)
            target = jax.nn.one_hot(labels, CLASSES) * (1 - LABEL_SMOOTHING) + LABEL_SMOOTHING / CLASSES
            return -(target * jax.nn.log_softmax(logits)).sum(1).mean(), stats

        def step(params, velocity, stats, x, labels):
            (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params, stats, x, labels)
            velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
            return jax.tree.map(lambda p, v: p - LEARNING_RATE * v, params, velocity), velocity, stats, loss

        self.step = jax.jit(step, donate_argnums=(0, 1, 2))

    def __call__(self) -> object:
        self.params, self.velocity, self.stats, loss = self.jax.block_until_ready(
            self.step(self.params, self.velocity, self.stats, self.images, self.labels)
        )
        return loss

    def first_step(self) -> FirstStep:
        loss = self()
        # Behind the first step the velocity is the gradient.
        classifier = torch.from_numpy(numpy.array(self.velocity[-1]["weight"]))
        stem = torch.from_numpy(numpy.array(self.velocity[0]["weight"])).permute(3, 2, 0, 1)
        return FirstStep(float(loss), classifier, stem)


class Jax(Peer):
    module, version_of = "jax", "jax"

    def refuses(self, work: Workload) -> str | None:
        if not work.is_mobilenet_v1:
            return "written out here for MobileNetV1"
        import jax

        backend = jax.default_backend()
        if backend != ("gpu" if work.device == "cuda" else "cpu"):
            return f"installed JAX runs on the {backend}"
        return None

    def inference(self, work: Workload) -> Inference:
        return Inference(work)

    def training(self, work: Workload) -> Training:
        return Training(work)
