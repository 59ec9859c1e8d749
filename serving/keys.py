"""Names of everything in Redis, and which partition a user belongs to.

Knows no connection. All keys of partition p share one hash slot, `{<ns>:<p>}`, so that one script
can
change them together; lists stand at `<ns>:top:<user>` where one server holds everything, and in the
partition's slot on Redis Cluster. When users move to other partitions (streams/migrate.py) an epoch
begins, and with it other names: `{<ns>:e1:<p>}`. `<ns>:meta` says which layout and epoch, and how
many partitions there are.
"""

import re
from functools import lru_cache
from typing import Literal

import msgspec

Layout = Literal["single", "cluster"]


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader must know to find a list; stored as JSON at `<ns>:meta`."""

    v: int = 1
    layout: Layout = "single"
    partitions: int = 0
    topic: str = ""
    topic_id: str = ""
    """Kafka's id of that topic: one created anew is another log."""
    k: int = 50
    epoch: int = 0
    """How often users were moved to other partitions; part of a partition's keys from 1 on."""
    base_partitions: int = 0
    """Partitions of the epoch before, whose records this epoch began with; 0: they are gone."""
    base_until_ms: int = 0
    """Unix milliseconds from which on Redis drops them."""


class Keys:
    """Key names of one namespace."""

    def __init__(
        self, namespace: str, *, layout: Layout = "single", partitions: int = 0, epoch: int = 0
    ) -> None:
        self.namespace = namespace
        self.layout = layout
        self.partitions = partitions
        self.epoch = epoch
        # A namespace holds no colon, so none can look like another one's epoch.
        self._slots = f"{namespace}:e{epoch}" if epoch else namespace
        self.meta = f"{namespace}:meta"
        self.unavailable = f"{{{namespace}}}:unavailable"
        self.unavailable_version = f"{{{namespace}}}:unavailable:version"
        self.fallback = f"{namespace}:top:"

    def head(self, partition: int) -> str:
        """How far the partition's log is folded, and under which inputs."""
        return f"{{{self._slots}:{partition}}}:head"

    def inputs(self, partition: int) -> str:
        """Redis list of what else entered the partition's fold, and from which offset on."""
        return f"{{{self._slots}:{partition}}}:inputs"

    def due(self, partition: int) -> str:
        """Redis hash of the users whose lists were put off: record key → what it must answer."""
        return f"{{{self._slots}:{partition}}}:due"

    def user(self, partition: int, user_id: str) -> str:
        """A user's packed record."""
        return f"{{{self._slots}:{partition}}}:u:{user_id}"

    def users_pattern(self, partition: int) -> str:
        """Glob that finds every record of a partition."""
        return f"{{{_glob_escape(self._slots)}:{partition}}}:u:*"

    def partitions_pattern(self) -> str:
        """Glob that finds everything of every partition of this epoch, and more."""
        return f"{{{_glob_escape(self._slots)}:*}}:*"

    def partition_key(self) -> bytes:
        """Expression that a partition's key of this epoch matches: partition, and the rest."""
        return rb"\{%b:(\d+)\}:(.*)" % re.escape(self._slots).encode()

    def patterns(self, partition: int) -> list[str]:
        """Globs that find everything of a partition; `is_of` sorts out what else they find."""
        patterns = [f"{{{_glob_escape(self._slots)}:{partition}}}:*"]
        if self.layout == "single":
            patterns.append(f"{_glob_escape(self.namespace)}:top:?*")
        return patterns

    def is_of(self, partition: int, name: str) -> bool:
        """Whether a name that `patterns` found is of this partition."""
        if self.layout == "cluster" or name.startswith("{"):
            return True
        user = name.removeprefix(self.fallback)
        return partition_of(user, self.partitions) == partition

    def popularity(self, partition: int, bucket: int) -> str:
        """Redis hash of one hour's click counts per item."""
        return f"{{{self._slots}:{partition}}}:pop:{bucket}"

    def signals(self, partition: int) -> str:
        """Redis sorted set of the moves that are on their way to topic `signals`."""
        return f"{{{self._slots}:{partition}}}:signals"

    def popularity_summary(self, partition: int) -> str:
        """A partition's most popular items, from which the fallback list is made."""
        return f"{{{self._slots}:{partition}}}:pop:summary"

    def top(self, partition: int, user_id: str) -> str:
        """A user's list."""
        if self.layout == "cluster":
            return f"{{{self._slots}:{partition}}}:top:{user_id}"
        return f"{self.namespace}:top:{user_id}"

    def top_of(self, user_id: str) -> str:
        """A user's list, for a reader that does not know the partition."""
        if self.layout == "cluster":
            return self.top(partition_of(user_id, self.partitions), user_id)
        return self.top(0, user_id)


@lru_cache(maxsize=1 << 16)
def partition_of(user_id: str, num_partitions: int) -> int:
    """Partition that Kafka's default partitioner gives a key.

    Source: `org.apache.kafka.common.utils.Utils.murmur2` and `toPositive`.
    """
    return (murmur2(user_id.encode()) & 0x7FFFFFFF) % num_partitions


def murmur2(data: bytes) -> int:
    """32-bit MurmurHash2 with Kafka's seed, as an unsigned integer."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        k = (k ^ (k >> 24)) * m & mask
        h = (h * m & mask) ^ k
    tail = data[whole:]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return h ^ (h >> 15)


def _glob_escape(text: str) -> str:
    return "".join(f"\\{char}" if char in "*?[]\\" else char for char in text)
