"""Several processes that train one model, as `torchrun` starts them.

Knows no model and no data. Every process draws the same batches, candidates and dropout masks,
takes its own columns of each batch, and adds its gradients to the others': so all hold the same
weights all the time, and what they learn is what one process would. One process alone is a group of
one.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, distributed

from afterclick.serving.errors import ConfigError


def join(environ: Mapping[str, str] = os.environ) -> bool:
    """Join the group that `torchrun` describes in the environment; False without one.

    Raises:
        ConfigError: the others cannot be reached.
    """
    if int(environ.get("WORLD_SIZE", "1")) <= 1:
        return False
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(environ.get("LOCAL_RANK", "0")))
    try:
        distributed.init_process_group("nccl" if has_gpu else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"training: the processes of torchrun do not find each other: {error}; see the "
            "network's rules between the machines, and --rdzv-endpoint"
        ) from error
    return True


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End the group, if there is one, when what was to be done in it is done."""
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def rank() -> int:
    """Number of this process; 0 writes the release."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """Processes in the group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors, of the same shapes everywhere, by their sums over the group."""
    if size() == 1:
        return
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(joined)
    parts = torch.split(joined, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
