"""Compile a function of arrays to machine code, when it is first called, and keep that code.

Compiled by numba: strict IEEE arithmetic, no reordering, so a sum has the same bits whatever
surrounds it; without the interpreter lock, so threads overlap. The code is kept beside the module,
else where `NUMBA_CACHE_DIR` or the user's cache is; where nothing can be written every process
compiles its own, which takes some seconds. A kept function is compiled anew when its own file
changes and no other one: whatever a compiled function calls or reads stands in its module, or is
an argument.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled for the types of its arguments at the first call with them."""
    try:
        found = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # nowhere to keep it
        found = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Callable[P, R], found)
