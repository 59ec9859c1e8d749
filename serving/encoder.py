"""Vectors of an item that training never saw, from what the item says about itself.

The numpy twin of the content part of training/model.py: same features (serving/text.py), same sums.
Knows no catalogue and no ids. Shape letters: K buckets that training met, D item vector, V entries
of a given vector.

The same bits on every machine: rows are added one after the other in float64, and the one norm that
decides is an exactly rounded sum.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import ENCODER_NAME, EncoderSpec, Manifest
from afterclick.serving.text import TEXT_VERSION, Described, bucket, features, warm

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

NORM_MIN = 1e-6
"""A shorter sum says nothing of its direction: such an item has no vector."""


class Encodable(Described, Protocol):
    """An item with, perhaps, a vector of its own."""

    @property
    def vector(self) -> list[float] | None: ...  # noqa: D102


class Encoded(NamedTuple):
    """An item's vectors."""

    step_D: F32
    scan_D1: F32
    """The bias is the last coordinate."""


class ItemEncoder:
    """Tables of one release."""

    def __init__(self, spec: EncoderSpec, bucket_K: I64, vector_KD: F32, given_VD: F32) -> None:
        self.spec = spec
        self._row_of = {number: row for row, number in enumerate(bucket_K.tolist())}
        self._vector_KD = vector_KD.astype(np.float64)
        self._given_VD = given_VD.astype(np.float64)

    @classmethod
    def from_release(cls, folder: Path, manifest: Manifest) -> "ItemEncoder | None":
        """Read a release's tables and load the dictionary; None for a release without them.

        Raises:
            ContractError: tables that cannot be read, of other shapes than the manifest says, not
                finite, or made by another version of the text function.
        """
        spec = manifest.encoder
        if spec is None:
            return None
        where = f"release {folder.name}: {ENCODER_NAME}"
        if spec.text_version != TEXT_VERSION:
            raise ContractError(
                f"{where}: text function {spec.text_version}, this worker has {TEXT_VERSION}; "
                "train again with this version",
                reason="schema",
            )
        try:
            with np.load(folder / ENCODER_NAME, allow_pickle=False) as data:
                bucket_K, vector_KD, given_VD = data["bucket"], data["vector"], data["given"]
        except (OSError, KeyError, ValueError) as error:
            raise ContractError(f"{where}: cannot be read: {error!r}", reason="items") from error
        dim = manifest.step_dim
        expected = ((len(bucket_K), dim), (spec.given_dim, dim))
        found = (vector_KD.shape, given_VD.shape)
        if found != expected or bucket_K.ndim != 1:
            raise ContractError(
                f"{where}: tables of shapes {found}, the manifest says {expected}", reason="items"
            )
        if not (np.isfinite(vector_KD).all() and np.isfinite(given_VD).all()):
            raise ContractError(f"{where}: vectors are not finite", reason="non-finite")
        warm()
        return cls(spec, bucket_K, vector_KD, given_VD)

    def encode(self, item: Encodable) -> Encoded | None:
        """Vectors of an item; None where nothing that it says was met in training.

        Cost: about 0.1 ms for a title, some ms for a long text.
        """
        sum_D = np.zeros(self._vector_KD.shape[1])
        for field in features(item):
            numbers = (bucket(feature, self.spec.num_buckets) for feature in field)
            known = [self._row_of[number] for number in numbers if number in self._row_of]
            if known:
                sum_D += self._vector_KD[known].sum(axis=0) / math.sqrt(len(known))
        if (given_V := unit(item.vector, self.spec.given_dim)) is not None:
            sum_D += (self._given_VD * given_V[:, None]).sum(axis=0)
        norm = math.sqrt(math.fsum((sum_D * sum_D).tolist()))
        if not NORM_MIN < norm < math.inf:
            return None
        direction_D = sum_D / norm if self.spec.step_norm else sum_D
        step_D = direction_D * self.spec.step_norm if self.spec.step_norm else direction_D
        scan_D1 = np.append(direction_D, self.spec.bias)
        return Encoded(step_D.astype(np.float32), scan_D1.astype(np.float32))


def unit(vector: Sequence[float] | None, length: int) -> F64 | None:
    """A given vector at length 1; None for one of another size, or without a direction."""
    if vector is None or len(vector) != length or not length:
        return None
    norm = math.sqrt(math.fsum(value * value for value in vector))
    return np.array(vector) / norm if NORM_MIN < norm < math.inf else None
