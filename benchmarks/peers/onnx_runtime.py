"""ONNX Runtime, from an export of the plain network."""

from __future__ import annotations

import importlib.util
import io
import logging

import torch
from torch import Tensor

from benchmarks.network import Workload
from benchmarks.peers.base import Peer


class Inference:
    def __init__(self, model: torch.nn.Module, images: Tensor, device: str) -> None:
        import onnxruntime

        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        file = io.BytesIO()
        images = images.contiguous()
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        self.session = onnxruntime.InferenceSession(file.getvalue(), options, providers=[provider])
        self.inputs = {self.session.get_inputs()[0].name: images.cpu().numpy()}

    def __call__(self) -> object:
        (self.output,) = self.session.run(None, self.inputs)
        return self.output

    def logits(self) -> Tensor:
        return torch.from_numpy(self.output)


class OnnxRuntime(Peer):
    module, version_of = "onnxruntime", "onnxruntime"

    def refuses(self, work: Workload) -> str | None:
        import onnxruntime

        if work.task == "training":
            return "inference only"
        if work.dtype == "bfloat16":
            return "has no bfloat16 convolutions"
        if work.device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "installed without CUDA"
        if importlib.util.find_spec("onnxscript") is None:
            return "onnxscript, which exports the network, is not installed"
        return None

    def inference(self, work: Workload) -> Inference:
        dtype = work.torch_dtype
        return Inference(work.plain().eval().to(dtype), work.images().to(dtype), work.device)
