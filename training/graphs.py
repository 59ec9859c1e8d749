"""The two ONNX graphs of a release, built node by node from a trained model's weights.

Knows no files and does not run anything. Opset 17, IR 9: what the oldest ONNX Runtime we support
reads. Shape letters: T steps, B users, D item vector, H hidden units, Y layers.

Built by hand rather than by torch's exporter so that the graph is small enough to read, takes
`sequence_lens`, and holds only constant weights: the rule that keeps bits equal whatever the batch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from afterclick.training.cells import ABSENT, PastAttention
from afterclick.training.model import NORM_MIN, Recommender

OPSET = 17
IR_VERSION = 9

F32 = npt.NDArray[np.float32]

_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
"""Torch's gate blocks in ONNX's order: i f g o → i o f c, and r z n → z r h."""


def state_names(model: Recommender) -> tuple[str, ...]:
    """State tensors, hidden state first."""
    return ("h", "c") if model.settings.cell == "lstm" else ("h",)


def step_graph(model: Recommender) -> onnx.ModelProto:
    """`x, lens, [event], [gap], [hour], states -> <state>_next`; one recurrent node per layer."""
    settings = model.settings
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    inputs = [
        _info("x", TensorProto.FLOAT, ["T", "B", settings.dim]),
        _info("lens", TensorProto.INT32, ["B"]),
    ]
    feed = "x"
    for name, table in (("event", model.events), ("gap", model.gaps), ("hour", model.hours)):
        if table is None:
            continue
        inputs.append(_info(name, TensorProto.INT64, ["T", "B"]))
        constants.append(numpy_helper.from_array(_array(table.weight), f"{name}_vectors"))
        nodes.append(helper.make_node("Gather", [f"{name}_vectors", name], [f"{name}_x"]))
        nodes.append(helper.make_node("Add", [feed, f"{name}_x"], [f"x_{name}"]))
        feed = f"x_{name}"
    names = state_names(model)
    outputs = [_state(f"{name}_next", model) for name in names]
    inputs += [_state(name, model) for name in names]
    parts = {name: _layers_of(name, settings.layers, nodes) for name in names}
    after: dict[str, list[str]] = {name: [] for name in names}
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "directions"))
    for layer in range(settings.layers):
        constants += _layer_weights(model, layer)
        is_last = layer == settings.layers - 1
        kept = [f"{name}_next" if settings.layers == 1 else f"{name}{layer}_next" for name in names]
        for name, output in zip(names, kept, strict=True):
            after[name].append(output)
        weights = [f"{kind}{layer}" for kind in ("W", "R", "B")]
        extra: dict[str, Any] = {} if settings.cell == "lstm" else {"linear_before_reset": 1}
        nodes.append(
            helper.make_node(
                settings.cell.upper(),
                [feed, *weights, "lens", *(parts[name][layer] for name in names)],
                ["" if is_last else f"y{layer}", *kept],
                hidden_size=settings.units,
                **extra,
            )
        )
        if not is_last:
            feed = f"x{layer + 1}"
            nodes.append(helper.make_node("Squeeze", [f"y{layer}", "directions"], [feed]))
    if settings.layers > 1:
        nodes += [helper.make_node("Concat", after[n], [f"{n}_next"], axis=0) for n in names]
    else:
        constants = [constant for constant in constants if constant.name != "directions"]
    return _model("step", nodes, inputs, outputs, constants)


def query_graph(model: Recommender) -> onnx.ModelProto:
    """`states, [past, has_past] -> query, [query_purchase]`: projections of the last h, their norm
    and scale, and a 1.
    """
    settings = model.settings
    names = state_names(model)
    constants = [
        numpy_helper.from_array(np.array(settings.layers - 1, np.int64), "last_layer"),
        numpy_helper.from_array(np.array([0], np.int64), "zero"),
        numpy_helper.from_array(np.array([1], np.int64), "one"),
        numpy_helper.from_array(np.array(0, np.float32), "nothing"),
        numpy_helper.from_array(np.array(1, np.float32), "unit"),
    ]
    nodes = [
        helper.make_node("Gather", ["h", "last_layer"], ["h_BH"], axis=0),
    ]
    inputs = [_state(name, model) for name in names]
    if model.attend is not None:
        inputs += [
            _info("past", TensorProto.FLOAT, ["B", settings.past, settings.dim]),
            _info("has_past", TensorProto.FLOAT, ["B", settings.past]),
        ]
        _attention(model.attend, settings.dim, constants, nodes)
    if model.is_cosine:
        constants += [
            numpy_helper.from_array(np.array(NORM_MIN, np.float32), "norm_min"),
            numpy_helper.from_array(np.array(model.scale.item(), np.float32), "scale"),
        ]
    heads = {"query": model.out} | ({} if model.buy is None else {"query_purchase": model.buy})
    queries = {
        output: _head(f"{output}_", project, model, constants, nodes)
        for output, project in heads.items()
    }
    # A column of ones as long as the batch, from an entry of every state: all of them are inputs.
    columns = []
    for name in names:
        nodes += [
            helper.make_node("Gather", [name, "last_layer"], [f"{name}_last"], axis=0),
            helper.make_node("Slice", [f"{name}_last", "zero", "one", "one"], [f"{name}_B1"]),
            helper.make_node("Mul", [f"{name}_B1", "nothing"], [f"{name}_zero"]),
        ]
        columns.append(f"{name}_zero")
    ones = columns[0]
    for name in columns[1:]:
        nodes.append(helper.make_node("Add", [ones, name], [f"{name}_sum"]))
        ones = f"{name}_sum"
    nodes.append(helper.make_node("Add", [ones, "unit"], ["ones_B1"]))
    nodes += [
        helper.make_node("Concat", [query, "ones_B1"], [output], axis=1)
        for output, query in queries.items()
    ]
    outputs = [_info(name, TensorProto.FLOAT, ["B", settings.dim + 1]) for name in queries]
    return _model("query", nodes, inputs, outputs, constants)


def _head(
    prefix: str,
    project: nn.Linear,
    model: Recommender,
    constants: list[onnx.TensorProto],
    nodes: list[onnx.NodeProto],
) -> str:
    """`h_BH, [attended_BD] -> ` a head's query, the 1 apart; its name."""
    weight, bias, q = f"{prefix}weight", f"{prefix}bias", f"{prefix}q"
    constants += [
        numpy_helper.from_array(np.ascontiguousarray(_array(project.weight).T), weight),
        numpy_helper.from_array(_array(project.bias), bias),
    ]
    nodes += [
        helper.make_node("MatMul", ["h_BH", weight], [f"{prefix}projected"]),
        helper.make_node("Add", [f"{prefix}projected", bias], [q]),
    ]
    if model.attend is not None:
        nodes.append(helper.make_node("Add", [q, "attended_BD"], [f"{prefix}attended"]))
        q = f"{prefix}attended"
    if not model.is_cosine:
        return q
    norm, safe, direction = f"{prefix}norm", f"{prefix}norm_safe", f"{prefix}direction"
    nodes += [
        helper.make_node("ReduceL2", [q], [norm], axes=[1], keepdims=1),
        helper.make_node("Max", [norm, "norm_min"], [safe]),
        helper.make_node("Div", [q, safe], [direction]),
        helper.make_node("Mul", [direction, "scale"], [f"{prefix}scaled"]),
    ]
    return f"{prefix}scaled"


def _attention(
    attend: PastAttention,
    dim: int,
    constants: list[onnx.TensorProto],
    nodes: list[onnx.NodeProto],
) -> None:
    """`h_BH, past, has_past -> attended_BD`, as `PastAttention.forward`."""
    weights = {
        "ask_weight": _array(attend.ask.weight).T * np.float32(dim**-0.5),
        "key_weight": _array(attend.key.weight).T,
        "value_weight": _array(attend.value.weight).T,
        "place": _array(attend.place_M),
        "absent": np.array(ABSENT, np.float32),
        "axis_1": np.array([1], np.int64),
        "axis_2": np.array([2], np.int64),
    }
    constants += [
        numpy_helper.from_array(np.ascontiguousarray(array), name)
        for name, array in weights.items()
    ]
    for kind, feed, out in (
        ("MatMul", ["h_BH", "ask_weight"], "ask_BD"),
        ("Unsqueeze", ["ask_BD", "axis_2"], "ask_BD1"),
        ("MatMul", ["past", "key_weight"], "key_BMD"),
        ("MatMul", ["key_BMD", "ask_BD1"], "logit_BM1"),
        ("Squeeze", ["logit_BM1", "axis_2"], "logit_BM"),
        ("Add", ["logit_BM", "place"], "placed_BM"),
        ("Sub", ["has_past", "unit"], "lack_BM"),
        ("Mul", ["lack_BM", "absent"], "away_BM"),
        ("Add", ["placed_BM", "away_BM"], "there_BM"),
    ):
        nodes.append(helper.make_node(kind, feed, [out]))
    nodes.append(helper.make_node("Softmax", ["there_BM"], ["share_BM"], axis=1))
    for kind, feed, out in (
        ("Mul", ["share_BM", "has_past"], "weight_BM"),
        ("Unsqueeze", ["weight_BM", "axis_1"], "weight_B1M"),
        ("MatMul", ["past", "value_weight"], "value_BMD"),
        ("MatMul", ["weight_B1M", "value_BMD"], "attended_B1D"),
        ("Squeeze", ["attended_B1D", "axis_1"], "attended_BD"),
    ):
        nodes.append(helper.make_node(kind, feed, [out]))


def _layers_of(name: str, layers: int, nodes: list[onnx.NodeProto]) -> list[str]:
    """Names of a state tensor's layers; several are split first."""
    if layers == 1:
        return [name]
    parts = [f"{name}{layer}" for layer in range(layers)]
    nodes.append(helper.make_node("Split", [name], parts, axis=0))
    return parts


def _layer_weights(model: Recommender, layer: int) -> list[onnx.TensorProto]:
    """W (1, gates·H, inputs), R (1, gates·H, H) and B (1, 2·gates·H), gates in ONNX's order."""
    order = _GATES[model.settings.cell]

    def ordered(name: str) -> F32:
        blocks = np.split(_array(getattr(model.cell, f"{name}_l{layer}")), len(order))
        return np.concatenate([blocks[gate] for gate in order])

    bias = np.concatenate([ordered("bias_ih"), ordered("bias_hh")])
    return [
        numpy_helper.from_array(ordered("weight_ih")[None], f"W{layer}"),
        numpy_helper.from_array(ordered("weight_hh")[None], f"R{layer}"),
        numpy_helper.from_array(bias[None], f"B{layer}"),
    ]


def _array(tensor: object) -> F32:
    array: F32 = tensor.detach().cpu().numpy()  # type: ignore[attr-defined]
    return array


def _info(name: str, kind: int, shape: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _state(name: str, model: Recommender) -> onnx.ValueInfoProto:
    settings = model.settings
    return _info(name, TensorProto.FLOAT, [settings.layers, "B", settings.units])


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: list[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(model, full_check=True)
    return model
