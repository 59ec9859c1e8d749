"""ONNX graphs with fewer bytes: int8 weights, int8 matrix products, zeros.

Pure: a graph in, another out. Knows no release and no data. What each brings stands in
training/compress.py.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
MATRIX = frozenset({"MatMul", "Gemm"})

SMALL = 16
"""Tensors with fewer entries (scales, axes, constants) are never touched."""


def weights_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose recurrent weights are int8 with one static scale per gate and unit."""
    model = _copy(model)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    unpack = []
    for node in graph.node:
        for name in node.input[1:3] if node.op_type in RECURRENT else ():
            tensor = tensors.pop(name, None)
            if tensor is None:
                continue
            weight = numpy_helper.to_array(tensor)
            scale = np.maximum(np.abs(weight).max(axis=(0, 2)), 1e-12) / 127
            packed = np.clip(np.rint(weight / scale[None, :, None]), -127, 127).astype(np.int8)
            graph.initializer.remove(tensor)
            parts = [f"{name}_int8", f"{name}_scale"]
            arrays = (packed, scale.astype(np.float32))
            graph.initializer.extend(map(numpy_helper.from_array, arrays, parts))
            unpack.append(helper.make_node("DequantizeLinear", parts, [name], axis=1))
    nodes = [*unpack, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def matrices_int8(model: onnx.ModelProto, feeds: list[dict[str, Any]]) -> onnx.ModelProto:
    """A copy whose matrix products are int8, with static scales from the values in `feeds`."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory(prefix="afterclick-int8-") as folder:
        plain, packed = Path(folder) / "plain.onnx", Path(folder) / "packed.onnx"
        onnx.save(model, str(plain))
        quantize_static(
            plain,
            packed,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=sorted(MATRIX),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        model = _copy(onnx.load(str(packed)))
    return model


def pruned(model: onnx.ModelProto, share: float) -> onnx.ModelProto:
    """A copy in which this share of every weight matrix, its smallest entries, is zero."""
    model = _copy(model)
    used = {
        name
        for node in model.graph.node
        if node.op_type in RECURRENT | MATRIX
        for name in (node.input[1:3] if node.op_type in RECURRENT else node.input[:2])
    }
    for tensor in model.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if tensor.name in used and weight.size >= SMALL:
            smallest = np.quantile(np.abs(weight), share)
            kept = np.where(np.abs(weight) > smallest, weight, np.float32(0))
            tensor.CopyFrom(numpy_helper.from_array(kept, tensor.name))
    return model


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    return copied
