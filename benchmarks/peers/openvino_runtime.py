"""OpenVINO on the CPU, from a trace of the plain network."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.network import Workload
from benchmarks.peers.base import Peer

PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class Inference:
    """float32 images and logits; OpenVINO converts inside, as it advises."""

    def __init__(self, model: torch.nn.Module, images: Tensor, precision: str) -> None:
        import openvino

        images = images.contiguous()
        converted = openvino.convert_model(model, example_input=images)
        converted.reshape(list(images.shape))
        hints = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.request = openvino.Core().compile_model(converted, "CPU", hints).create_infer_request()
        self.array = images.numpy()  # shared: must live as long
        self.request.set_input_tensor(openvino.Tensor(self.array, shared_memory=True))

    def __call__(self) -> object:
        self.request.infer()
        return self.request

    def logits(self) -> Tensor:
        return torch.from_numpy(self.request.get_output_tensor().data.copy())


class OpenVino(Peer):
    module, version_of = "openvino", "openvino"

    def refuses(self, work: Workload) -> str | None:
        if work.task == "training":
            return "inference only"
        return None if work.device == "cpu" else "has no NVIDIA GPUs"

    def inference(self, work: Workload) -> Inference:
        return Inference(work.plain().eval(), work.images(), PRECISION[work.dtype])
