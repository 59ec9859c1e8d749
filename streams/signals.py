"""What every worker hears of everybody's clicks: the messages of topic `signals`, and how they
become a memory.

A chunk's commit leaves its moves in the partition's outbox in Redis; the partition's owner sends
them on (outbox.py). They may come twice, after a crash or a failover, so whoever reads skips, per
log, what lies below the offset reached. A memory therefore is a function of its release and of the
topic's first `offset` records, whoever sent them, however often, in whatever pieces.

Pure: knows neither Kafka nor Redis.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import msgspec

from afterclick.serving.errors import ContractError
from afterclick.serving.memory import Move
from afterclick.streams.record import Record

log = logging.getLogger(__name__)


class Origin(NamedTuple):
    """Whose offsets a message's moves have: offsets of another epoch or topic are others."""

    epoch: int
    topic_id: str
    partition: int


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    """The moves of one chunk of clicks; msgpack array, an entry of the outbox."""

    begin: int
    end: int
    """The chunk was `[begin, end)`."""
    moves: list[tuple[int, Move]]
    """Offset of the click, and what it counts for; in log order."""


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """Value of one record of topic `signals`, msgpack: parcels of one partition, in log order."""

    v: int = 1
    namespace: str
    """Whose fold it was: several may share the topic, each reads its own."""
    epoch: int
    topic_id: str
    partition: int
    parcels: list[msgspec.Raw]


class SignalsMemory(Protocol):
    """What absorbing needs of `serving.memory.Memory`."""

    def absorb(self, moves: Sequence[Move]) -> None: ...  # noqa: D102


def encode_parcel(begin: int, end: int, moves: Sequence[tuple[int, Move]]) -> bytes:
    """An entry of the outbox."""
    return _encoder.encode(Parcel(begin, end, list(moves)))


def decode_parcel(data: bytes) -> Parcel:
    """What `encode_parcel` made.

    Raises:
        ContractError: it is something else.
    """
    try:
        return _parcels.decode(data)
    except msgspec.MsgspecError as error:
        raise ContractError(f"signals: parcel: {error}", reason="signal") from error


def pieces_of(packed: bytes, moves_max: int) -> list[tuple[int, bytes]]:
    """A parcel cut into smaller ones: offset of each one's last move, and its bytes."""
    parcel = decode_parcel(packed)
    cuts = range(0, len(parcel.moves), moves_max)
    parts = [parcel.moves[at : at + moves_max] for at in cuts]
    borders = [parcel.begin, *(part[0][0] for part in parts[1:]), parcel.end]
    return [
        (part[-1][0], encode_parcel(begin, end, part))
        for (begin, end), part in zip(pairwise(borders), parts, strict=True)
    ]


def encode_signal(namespace: str, origin: Origin, parcels: Iterable[bytes]) -> bytes:
    """A record's value from entries of one outbox, in their order."""
    return _encoder.encode(
        Signal(
            namespace=namespace,
            epoch=origin.epoch,
            topic_id=origin.topic_id,
            partition=origin.partition,
            parcels=[msgspec.Raw(parcel) for parcel in parcels],
        )
    )


def decode_signal(value: bytes | None) -> Signal:
    """A record's value; its parcels are decoded one by one.

    Raises:
        ContractError: it is not what we write.
    """
    try:
        signal = _signals.decode(value or b"")
    except msgspec.MsgspecError as error:
        raise ContractError(f"signals: {error}", reason="signal") from error
    if signal.v != 1:
        raise ContractError(f"signals: version {signal.v}, this worker reads 1", reason="signal")
    return signal


def origin_of(signal: Signal) -> Origin:
    """Whose offsets its moves have."""
    return Origin(signal.epoch, signal.topic_id, signal.partition)


class Sifted(NamedTuple):
    """What some records bring that was not there before."""

    moves: list[Move]
    offset: int
    """After the last record that was looked at."""


class Absorber:
    """A memory as of a place in the topic.

    Args:
        memory: as the release ships it.
        namespace: whose messages count.
        known: per partition of the clicks, as text: clicks below this offset are in the release's
            memory already.
        offset: where reading begins.
    """

    def __init__(
        self,
        memory: SignalsMemory,
        *,
        namespace: str,
        known: Mapping[str, int],
        offset: int,
    ) -> None:
        self.offset = offset
        """Records of the topic below this one are in the memory, or were passed over."""
        self._memory = memory
        self._namespace = namespace
        self._known = {int(partition): at for partition, at in known.items()}
        self._next: dict[Origin, int] = {}

    def sift(self, records: Iterable[Record], moves_max: int | None = None) -> Sifted:
        """Records in the topic's order; what comes out is to be taken before the next are sifted.

        A record that is not ours to read counts as passed over, for everybody alike.

        Args:
            records: those below `offset` are left out.
            moves_max: enough of them; the rest of the records is left for the next call.
        """
        moves: list[Move] = []
        offset = self.offset
        for record in records:
            if record.offset < offset:
                continue
            if moves_max is not None and len(moves) >= moves_max:
                break
            offset = record.offset + 1
            try:
                signal = decode_signal(record.value)
                if signal.namespace == self._namespace:
                    self._sift(signal, moves)
            except ContractError as error:
                log.warning("signals at %d: %s; passed over", record.offset, error)
        return Sifted(moves, offset)

    def take(self, sifted: Sifted) -> None:
        """Absorb; nobody may be reading the memory meanwhile."""
        if sifted.moves:
            self._memory.absorb(sifted.moves)
        self.offset = sifted.offset

    def _sift(self, signal: Signal, moves: list[Move]) -> None:
        origin = origin_of(signal)
        parcels = [decode_parcel(bytes(raw)) for raw in signal.parcels]
        at = self._next.get(origin, self._known.get(signal.partition, 0))
        for parcel in parcels:
            moves += [move for offset, move in parcel.moves if offset >= at]
            at = max(at, parcel.end)
        self._next[origin] = at


_encoder = msgspec.msgpack.Encoder()
_parcels = msgspec.msgpack.Decoder(Parcel)
_signals = msgspec.msgpack.Decoder(Signal)
