"""Training rounds numbers below the smallest normal one to zero; whatever else runs here does not.

Early gradients of rare items are such numbers, which cost a CPU a hundred times a normal one:
serenade's first epoch took 92 s, the second 8 s. But the switch is the thread's, and lists made by
it afterwards, as live evaluation makes them, would not have a worker's bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushed() -> Iterator[None]:
    """Denormal numbers are zero meanwhile; also a decorator."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
