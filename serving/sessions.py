"""Where graphs run, and graphs that are ready to.

Knows no engine, nor what a graph is for.
"""

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from afterclick.serving.errors import ConfigError, ContractError

Provider = Literal["cpu", "cuda"]

log = logging.getLogger(__name__)


@lru_cache(maxsize=3)
def choose_provider(wanted: str) -> Provider:
    """Decide where graphs run and say so.

    Args:
        wanted: `cpu`, `cuda`, or `auto` for CUDA where it works and the CPU elsewhere.

    Raises:
        ConfigError: `cuda` was asked for and a session on it does not start.
    """
    if wanted == "cpu":
        return "cpu"
    reason = _why_no_cuda()
    if reason is None:
        log.info("engine: running on CUDA")
        return "cuda"
    if wanted == "cuda":
        raise ConfigError(
            f"provider: asked for 'cuda', but {reason}; "
            "install 'afterclick[gpu]' on a machine with an NVIDIA GPU, or set provider to 'cpu'"
        )
    log.info("engine: running on the CPU (%s)", reason)
    return "cpu"


def graph_of(
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    constants: Sequence[Any] = (),
) -> bytes:
    """A graph of our own, checked, as `session_of` takes it."""
    graph = helper.make_graph(nodes, "afterclick", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def session_of(
    model: Path | bytes, provider: Provider, threads: int, *, unpack: bool = False
) -> ort.InferenceSession:
    """A graph, ready to run.

    Args:
        model: a file, or its bytes.
        provider: where it runs.
        threads: of one run; 0 means one per core.
        unpack: int8 weights become float32 once, at load, not at every call.

    Raises:
        ContractError: it is refused, or keeps tensors in another file.
    """
    options = ort.SessionOptions()
    if unpack:
        # Else an LSTM whose weights are int8 unpacks them per call: 108 µs instead of 43 for a
        # step, and other bits for another batch (measured; docs/decisions/0002-bit-exactness.md).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads take the cores that Redis, Kafka and decoding need: 8.4k -> 10.6k clicks/s
    # (faust.md).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    where = "a graph of ours" if isinstance(model, bytes) else f"{model.parent.name}/{model.name}"
    try:
        if isinstance(model, Path):
            _check_self_contained(model)
        return ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[provider_of(provider)],
        )
    except Exception as error:  # onnxruntime raises its own unrelated exception types
        raise ContractError(f"{where}: the graph is refused: {error}", reason="graph") from error


def provider_of(provider: Provider) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's name of a provider, and its options."""
    if provider == "cuda":
        # Off, or products lose 13 bits of 24, and a GPU's lists are not those of a CPU.
        return "CUDAExecutionProvider", {"use_tf32": "0"}
    return "CPUExecutionProvider", {}


def _check_self_contained(model: Path) -> None:
    """Weights in another file have no checksum in the manifest, and may lie outside the release."""
    graph = onnx.load(model, load_external_data=False)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in _tensors(graph)):
        raise ValueError("it keeps tensors in another file, expected them inside")


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a graph, its subgraphs and functions."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(part)


def _why_no_cuda() -> str | None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    try:
        ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return "this machine has no NVIDIA driver"
    preload: Callable[[], None] | None = getattr(ort, "preload_dlls", None)
    if preload is not None:
        preload()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    info = helper.make_tensor_value_info
    graph = graph_of(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        [info("a", TensorProto.FLOAT, [2, 2]), info("b", TensorProto.FLOAT, [2, 2])],
        [info("c", TensorProto.FLOAT, [2, 2])],
    )
    try:
        session = ort.InferenceSession(graph, options, providers=[provider_of("cuda")])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's own kinds
        return f"a session on it failed: {error}"
    if "CUDAExecutionProvider" not in session.get_providers():
        return "its libraries do not load (CUDA 13, cuDNN 9)"
    return None
