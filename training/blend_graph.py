"""The graph of the blend, built from weights: two hidden layers over normalised features.

`features (R, F) -> score (R,)`, constant weights, each row for itself. Features are normalised and
clipped in the graph, so that a worker feeds what it computed; a number far outside of what was
fitted counts as `CLIP` deviations. Knows no torch. Shape letters: R rows, F features, U units.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

F32 = npt.NDArray[np.float32]

CLIP = 5.0


def blend_graph(mean_F: F32, scale_F: F32, layers: Sequence[tuple[F32, F32]]) -> onnx.ModelProto:
    """Build the graph.

    Args:
        mean_F: taken from each feature.
        scale_F: what is left is multiplied by this.
        layers: weights (in, out) and biases (out) of each layer; the last has one output.
    """
    constants = [
        numpy_helper.from_array(mean_F.astype(np.float32), "mean"),
        numpy_helper.from_array(scale_F.astype(np.float32), "scale"),
        numpy_helper.from_array(np.array(-CLIP, np.float32), "low"),
        numpy_helper.from_array(np.array(CLIP, np.float32), "high"),
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
    ]
    nodes = [
        helper.make_node("Sub", ["features", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["scaled"]),
        helper.make_node("Clip", ["scaled", "low", "high"], ["x0"]),
    ]
    for number, (weight, bias) in enumerate(layers):
        constants.append(numpy_helper.from_array(weight.astype(np.float32), f"W{number}"))
        constants.append(numpy_helper.from_array(bias.astype(np.float32), f"b{number}"))
        is_last = number == len(layers) - 1
        out = "column" if is_last else f"y{number}"
        nodes.append(helper.make_node("Gemm", [f"x{number}", f"W{number}", f"b{number}"], [out]))
        if not is_last:
            nodes.append(helper.make_node("Relu", [out], [f"x{number + 1}"]))
    nodes.append(helper.make_node("Squeeze", ["column", "axis"], ["score"]))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "blend",
        [info("features", TensorProto.FLOAT, ["R", len(mean_F)])],
        [info("score", TensorProto.FLOAT, ["R"])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model
