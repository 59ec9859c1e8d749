"""The graphs of a release: advance states, read queries out of them.

Knows no Redis, Kafka, HTTP, nor what an item is. Shape letters: T steps, B users, S floats of state
in a record, E step vector, D scan vector, N rows of the item matrix, K results.

What keeps bits equal whatever the batch (measured, see docs/decisions/0002-bit-exactness.md):
constant weights, no user with zero steps in a call, no empty call.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import QUERY_NAME, STEP_NAME, Manifest
from afterclick.serving.sessions import choose_provider, session_of

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


class Codes(TypedDict, total=False):
    """What a step says beside its item; needed where the manifest says so."""

    event_TB: I64 | None
    """Event codes."""
    gap_TB: I64 | None
    """Gap buckets."""
    hour_TB: I64 | None
    """Hours of day."""


class Past(NamedTuple):
    """What B users touched last, newest first, padded to the manifest's M: always the same shape,
    so that a user's bits do not depend on how long somebody else's past is.
    """

    x_BME: F32
    """Step vectors, zeros where there is none."""
    has_BM: F32
    """1 where there is one, else 0."""


class Engine:
    """The two graphs of one release; safe to call from several threads."""

    def __init__(
        self, folder: Path, manifest: Manifest, *, provider: str = "auto", threads: int = 0
    ) -> None:
        self.manifest = manifest
        self._kept = np.float16 if manifest.state_dtype == "fp16" else np.float32
        self.provider = choose_provider(provider)
        self._step = session_of(folder / STEP_NAME, self.provider, threads, unpack=True)
        self._query = session_of(folder / QUERY_NAME, self.provider, threads)
        state_names = {tensor.name for tensor in manifest.state}
        _check_names(folder.name, STEP_NAME, self._step, state_names | _step_names(manifest))
        past = {"past", "has_past"} if manifest.inputs.past else set()
        _check_names(folder.name, QUERY_NAME, self._query, state_names | past)
        outputs = {tensor.name for tensor in self._query.get_outputs()}
        if missing := {output_of(head) for head in manifest.heads} - outputs:
            raise ContractError(
                f"release {folder.name}: {QUERY_NAME} has no output {sorted(missing)}",
                reason="graph",
            )

    def zero_state(self, num_users: int) -> F32:
        """(B, S) zeros: the state of a user without a step."""
        return np.zeros((num_users, self.manifest.state_floats), np.float32)

    def unpacked(self, states: Sequence[bytes]) -> F32:
        """(B, S) states of some records; an empty one is the zero state."""
        zero = bytes(self.manifest.state_bytes)
        joined = np.frombuffer(b"".join(state or zero for state in states), self._kept)
        return joined.reshape(len(states), -1).astype(np.float32, copy=False)

    def packed(self, state_BS: F32) -> list[bytes]:
        """What records hold of these states: exactly them, as `advance` has rounded them."""
        return [state_S.tobytes() for state_S in state_BS.astype(self._kept, copy=False)]

    def advance(self, state_BS: F32, x_TBE: F32, lens_B: I32, **codes: Unpack[Codes]) -> F32:
        """Advance every user by `lens_B` steps, and round as the release says after each of them:
        so it does not matter whether a state was in a record or in memory in between.

        Arguments and result are those of `run_steps`.
        """
        if self.manifest.state_dtype == "fp32":
            return self.run_steps(state_BS, x_TBE, lens_B, **codes)
        state_BS = state_BS.copy()
        for step in range(int(lens_B.max())):
            user_B, now = np.flatnonzero(lens_B > step), slice(step, step + 1)
            own: Any = {name: codes_TB[now, user_B] for name, codes_TB in _given(codes)}
            one_B = np.ones(len(user_B), np.int32)
            after_BS = self.run_steps(state_BS[user_B], x_TBE[now, user_B], one_B, **own)
            state_BS[user_B] = after_BS.astype(self._kept)
        return state_BS

    def run_steps(self, state_BS: F32, x_TBE: F32, lens_B: I32, **codes: Unpack[Codes]) -> F32:
        """What the step graph gives for `lens_B` steps of every user in one call, not rounded.

        Args:
            state_BS: states before, as records hold them.
            x_TBE: step vectors, rows beyond a user's length are ignored.
            lens_B: steps of each user, every one ≥ 1.
            codes: of each step; what the manifest does not ask for is left aside.

        Returns:
            (B, S) states after, a new array.

        Raises:
            ContractError: the graph gave a non-finite state.
        """
        assert len(lens_B) > 0, "an empty call aborts ONNX Runtime"
        assert int(lens_B.min()) > 0, "sequence_lens 0 returns zeros"
        feed: dict[str, Any] = {"x": x_TBE, "lens": lens_B, **self._split(state_BS)}
        asked = self.manifest.inputs
        wanted = {"event_TB": asked.event, "gap_TB": asked.gap, "hour_TB": asked.hour}
        feed |= {name[:-3]: codes_TB for name, codes_TB in _given(codes) if wanted[name]}
        names = [f"{tensor.name}_next" for tensor in self.manifest.state]
        parts = self._step.run(names, feed)
        state = np.concatenate(
            [part.transpose(1, 0, 2).reshape(len(lens_B), -1) for part in parts], axis=1
        )
        if not np.isfinite(state).all():
            raise ContractError(
                f"release {self.manifest.release}: step.onnx gave a non-finite state",
                reason="non-finite",
            )
        return state

    def query(self, state_BS: F32, past: Past | None = None, *, head: str = "click") -> F32:
        """(B, D) queries of states; a user's score for item n is `query · scan_vectors[n]`.

        Args:
            state_BS: states as records hold them.
            past: what the same users touched last; needed where the manifest says so.
            head: one of the manifest's.
        """
        assert len(state_BS) > 0, "an empty call aborts ONNX Runtime"
        assert (past is not None) == (self.manifest.inputs.past > 0), "the graph takes it or not"
        query: F32 = self._query.run([output_of(head)], self.query_feed(state_BS, past))[0]
        return query

    def query_feed(self, state_BS: F32, past: Past | None = None) -> dict[str, Any]:
        """What the query graph is given for these states, by input name."""
        feed: dict[str, Any] = dict(self._split(state_BS))
        if past is not None:
            feed |= {"past": past.x_BME, "has_past": past.has_BM}
        return feed

    def _split(self, state_BS: F32) -> dict[str, F32]:
        parts: dict[str, F32] = {}
        start = 0
        for tensor in self.manifest.state:
            stop = start + tensor.layers * tensor.units
            part = state_BS[:, start:stop].reshape(-1, tensor.layers, tensor.units)
            parts[tensor.name] = np.ascontiguousarray(part.transpose(1, 0, 2))
            start = stop
        return parts


def _given(codes: Codes) -> list[tuple[str, I64]]:
    named: Mapping[str, Any] = codes
    return [(name, codes_TB) for name, codes_TB in named.items() if codes_TB is not None]


def output_of(head: str) -> str:
    """Name of a head's output in the query graph."""
    return "query" if head == "click" else f"query_{head}"


def _step_names(manifest: Manifest) -> set[str]:
    names = {"x", "lens"}
    if manifest.inputs.event:
        names.add("event")
    if manifest.inputs.gap:
        names.add("gap")
    if manifest.inputs.hour:
        names.add("hour")
    return names


def _check_names(
    release: str, file: str, session: ort.InferenceSession, expected: set[str]
) -> None:
    found = {tensor.name for tensor in session.get_inputs()}
    if found != expected:
        raise ContractError(
            f"release {release}: {file} takes inputs {sorted(found)}, "
            f"the manifest says {sorted(expected)}",
            reason="graph",
        )
