"""AdamW for a model of which a batch touches few rows of the large tables.

Knows no data and no loss. The tables (item vectors, biases, content buckets) are stepped row by
row, with index operations: a dense step reads and writes every item's row six times over, whether
the batch met it or not. Rows that a batch did not touch keep their momentum unmoved until it does
(as torch's SparseAdam has it).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afterclick.training.model import Recommender, Rows
from afterclick.training.settings import TrainingSettings

BETAS = (0.9, 0.99)
"""AdamW's memory; a shorter one for squares than usual, because item rows see few gradients."""

EPSILON = 1e-8

BLOCK = 1024
"""Rows stepped at once on a CPU: what is computed in between stays in the cache, for a third of the
time (25,000 rows of 128: 17 ms, 48 in one go).
"""

WARM_UP = 0.1
"""Share of the run in which the learning rate rises."""


class _Table(NamedTuple):
    weight: Tensor
    mean: Tensor
    square: Tensor
    decay: float


class Optimiser:
    """Steps a model's weights along a batch's gradients."""

    def __init__(self, model: Recommender, settings: TrainingSettings) -> None:
        self._model, self._clip = model, settings.clip
        self._tables = [
            _Table(weight, torch.zeros_like(weight), torch.zeros_like(weight), decay)
            for weight, decay in (
                (model.items.weight.detach(), settings.weight_decay),
                (model.bias.detach(), 0.0),
                *(
                    [(model.buckets.weight.detach(), settings.weight_decay)]
                    if model.content is not None
                    else []
                ),
            )
        ]
        of_rows = {"items.weight", "bias", "buckets.weight"}
        named = [(n, w) for n, w in model.named_parameters() if n not in of_rows]
        free = {"scale", "prior"}
        self._dense = [weight for _, weight in named]
        groups: list[dict[str, Any]] = [
            {"params": [weight for name, weight in named if name not in free]},
            {"params": [weight for name, weight in named if name in free], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=settings.weight_decay,
        )
        self._step = 0

    def rows(self, item_X: Tensor) -> Rows:
        """The items' rows, to be differentiated."""
        rows = self._model.rows(item_X)
        for leaf in (rows.id_XD, rows.bias_X, rows.bucket_CD):
            leaf.requires_grad_()
        return rows

    def gradients(self, rows: Rows) -> list[Tensor]:
        """Gradients of a backward pass: of the rows, then of everything else."""
        leaves = [rows.id_XD, rows.bias_X, rows.bucket_CD, *self._dense]
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    def step(self, rows: Rows, gradients: Sequence[Tensor], rate: float) -> None:
        """One step; longer gradients are shortened to `settings.clip` together."""
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in gradients))
        if norm > self._clip:
            for grad in gradients:
                grad.mul_(self._clip / norm)
        self._step += 1
        for group in self._adam.param_groups:
            group["lr"] = rate
        for weight, grad in zip(self._dense, gradients[3:], strict=True):
            weight.grad = grad
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        touched = (rows.item_X, rows.item_X, rows.code_C)
        for table, at, grad in zip(self._tables, touched, gradients[:3], strict=False):
            self._step_rows(table, at, grad, rate)

    def _step_rows(self, table: _Table, at: Tensor, grad: Tensor, rate: float) -> None:
        size = BLOCK if at.device.type == "cpu" else max(len(at), 1)
        parts = zip(torch.split(at, size), torch.split(grad, size), strict=True)
        for part, grad_part in parts:
            self._step_block(table, part, grad_part, rate)

    def _step_block(self, table: _Table, at: Tensor, grad: Tensor, rate: float) -> None:
        mean = table.mean.index_select(0, at).lerp_(grad, 1 - BETAS[0])
        square = table.square.index_select(0, at).mul_(BETAS[1])
        square.addcmul_(grad, grad, value=1 - BETAS[1])
        table.mean.index_copy_(0, at, mean)
        table.square.index_copy_(0, at, square)
        spread = square.div_(1 - BETAS[1] ** self._step).sqrt_().add_(EPSILON)
        weight = table.weight.index_select(0, at).mul_(1 - rate * table.decay)
        weight.addcdiv_(mean, spread, value=-rate / (1 - BETAS[0] ** self._step))
        table.weight.index_copy_(0, at, weight)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "step": self._step,
            "adam": self._adam.state_dict(),
            "tables": [(table.mean, table.square) for table in self._tables],
        }

    def load_state_dict(self, data: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self._step = data["step"]
        self._adam.load_state_dict(data["adam"])
        for table, (mean, square) in zip(self._tables, data["tables"], strict=True):
            table.mean.copy_(mean)
            table.square.copy_(square)


def one_cycle(settings: TrainingSettings, total_steps: int) -> Callable[[int], float]:
    """Learning rate by step number: a straight rise, then half a cosine down to almost nothing."""
    if settings.rate_schedule == "constant":
        return lambda step: settings.learning_rate

    def rate(step: int) -> float:
        done = step / total_steps
        if done < WARM_UP:
            return settings.learning_rate * (0.04 + 0.96 * done / WARM_UP)
        left = min(1.0, (done - WARM_UP) / (1 - WARM_UP))
        return settings.learning_rate * max(1e-4, 0.5 * (1 + math.cos(math.pi * left)))

    return rate
