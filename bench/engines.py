"""What people deploy with: a block or a net, exported to ONNX as plain PyTorch, in onnxruntime and in OpenVINO.

An engine takes one shape, which it knows when it compiles; it reads x where it is and writes to memory of its own (io binding).
It has as many threads as torch, and none of them spins after a call, so that it takes no time from who is timed next.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gcnet_ext


class Engine(nn.Module):
    """A compiled net that is called as a module is, and cannot be trained. The next call overwrites what a call returned."""

    def __init__(self, run: Callable[[Tensor, Tensor], None], out: Tensor) -> None:
        super().__init__()
        self._run, self._out = run, out

    def forward(self, x: Tensor) -> Tensor:
        self._run(x, self._out)
        return self._out


def exported(module: nn.Module, x: Tensor) -> bytes:
    """The module as ONNX, for maps of the shape of x."""
    file = io.BytesIO()
    torch.onnx.export(gcnet_ext.to_plain(module).eval(), (x,), file, dynamo=False, input_names=["x"], output_names=["out"])
    return file.getvalue()


def _onnxruntime(library: Any, model: bytes) -> Callable[[Tensor, Tensor], None]:
    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()

    def run(x: Tensor, out: Tensor) -> None:
        for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "out", out)):
            bind(name, "cpu", 0, "float32", tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)

    return run


def _openvino(library: Any, model: bytes) -> Callable[[Tensor, Tensor], None]:
    core = library.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()

    def run(x: Tensor, out: Tensor) -> None:
        request.set_input_tensor(library.Tensor(x.numpy(), shared_memory=True))
        request.set_output_tensor(library.Tensor(out.numpy(), shared_memory=True))
        request.infer()

    return run


ENGINES = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def make_engines(module: nn.Module, x: Tensor, wanted: tuple[str, ...]) -> dict[str, Engine]:
    """The module in the engines of those names that are installed. They take float32 and NCHW; for another x there is none."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        return {}
    found = {}
    with torch.no_grad():
        out = module(x)
    for name in wanted:
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        found[name] = Engine(ENGINES[name](library, exported(module, x)), torch.empty_like(out))
    return found
