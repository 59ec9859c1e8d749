"""Redis for the simulation: one server with a replica behind it, and redis-py's own client on top.

Scripts are the production text, run by Lua 5.1, the version in Redis. Every command or
transaction is one step. A failover promotes a replica that lacks the last writes; the old primary
may go on answering some clients for a while. Keys never expire here.
"""

import contextlib
import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import redis
from lupa import lua51
from redis.client import Pipeline

from afterclick.serving import scripts
from tests.simulation.clock import Process, VirtualLoop

Command = Sequence[Any]
Value = bytes | list[bytes] | dict[bytes, bytes] | set[bytes]
"""A sorted set is a dict of its members' scores."""

JOURNAL_MAX = 64
"""Writes that a failover may take back."""


class Server:
    """Keys, values, and how the last writes can be taken back."""

    def __init__(self, data: dict[bytes, Value] | None = None) -> None:
        self.data: dict[bytes, Value] = data if data is not None else {}
        self.read_only = False
        self._journal: deque[dict[bytes, Value | None]] = deque(maxlen=JOURNAL_MAX)
        self._before: dict[bytes, Value | None] = {}
        self._scripts: set[str] = set()

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands as one step."""
        self._before = {}
        try:
            return [self._command(command) for command in commands]
        finally:
            if self._before:
                self._journal.append(self._before)

    def replica(self, lost: int) -> "Server":
        """What a replica holds that lacks the last `lost` writes; beyond the journal, nothing."""
        if lost > JOURNAL_MAX:
            return Server()
        data = dict(self.data)
        for before in list(self._journal)[::-1][:lost]:
            for key, value in before.items():
                if value is None:
                    data.pop(key, None)
                else:
                    data[key] = value
        return Server(data)

    def _command(self, command: Command) -> Any:
        name, *args = command
        if name == "EVALSHA":
            return self._script(*args)
        if name == "SCRIPT LOAD":
            sha = hashlib.sha1(_bytes(args[0])).hexdigest()  # noqa: S324 - Redis's own name for it
            _compiled.setdefault(sha, args[0])
            self._scripts.add(sha)
            return sha.encode()
        return getattr(self, f"_{name.lower()}")(*map(_bytes, args))

    def _script(self, sha: str, num_keys: int, *rest: Any) -> Any:
        if sha not in self._scripts:
            raise redis.exceptions.NoScriptError("No matching script. Please use EVAL.")
        if self.read_only:
            raise redis.exceptions.ReadOnlyError("You can't write against a read only replica.")
        values = [_bytes(value) for value in rest]
        return run_script(self, sha, values[:num_keys], values[num_keys:])

    # Commands -----------------------------------------------------------------------------------

    def _get(self, key: bytes) -> Any:
        return self.data.get(key)

    def _mget(self, *keys: bytes) -> list[Any]:
        return [self.data.get(key) for key in keys]

    def _exists(self, key: bytes) -> int:
        return int(key in self.data)

    def _set(self, key: bytes, value: bytes, *_: bytes) -> bytes:
        self._put(key, value)
        return b"OK"

    def _del(self, *keys: bytes) -> int:
        found = [key for key in keys if key in self.data]
        for key in found:
            self._put(key, None)
        return len(found)

    def _expire(self, key: bytes, _: bytes) -> int:
        return int(key in self.data)

    def _rpush(self, key: bytes, *values: bytes) -> int:
        self._put(key, [*self.data.get(key, []), *values])
        return len(self.data[key])

    def _lrange(self, key: bytes, first: bytes, last: bytes) -> list[bytes]:
        found: Any = self.data.get(key, [])
        end = int(last) + 1
        return found[int(first) : end or None]

    def _hgetall(self, key: bytes) -> list[bytes]:
        found: Any = self.data.get(key, {})
        return [part for pair in found.items() for part in pair]

    def _hget(self, key: bytes, field: bytes) -> bytes | None:
        found: Any = self.data.get(key, {})
        return found.get(field)

    def _hmget(self, key: bytes, *fields: bytes) -> list[bytes | None]:
        found: Any = self.data.get(key, {})
        return [found.get(field) for field in fields]

    def _hlen(self, key: bytes) -> int:
        return len(self.data.get(key, ()))

    def _hexists(self, key: bytes, field: bytes) -> int:
        return int(field in self.data.get(key, ()))

    def _hscan(self, key: bytes, *_: bytes) -> list[Any]:
        return [b"0", self._hgetall(key)]

    def _pttl(self, key: bytes) -> int:
        return 1_000_000 if key in self.data else -2

    def _hset(self, key: bytes, *pairs: bytes) -> int:
        table = self._table(key)
        before = len(table)
        table.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(table) - before

    def _hdel(self, key: bytes, *fields: bytes) -> int:
        if key not in self.data:
            return 0
        table = self._table(key)
        gone = sum(table.pop(field, None) is not None for field in fields)
        if not table:
            self._put(key, None)
        return gone

    def _hincrby(self, key: bytes, field: bytes, by: bytes) -> int:
        table = self._table(key)
        value = int(table.get(field, b"0")) + int(by)
        table[field] = b"%d" % value
        return value

    def _zadd(self, key: bytes, score: bytes, member: bytes) -> int:
        return self._hset(key, member, score)

    def _zcard(self, key: bytes) -> int:
        return len(self.data.get(key, ()))

    def _zrange(self, key: bytes, first: bytes, last: bytes, *_: bytes) -> list[bytes]:
        found: Any = self.data.get(key, {})
        members = sorted(found, key=lambda member: (float(found[member]), member))
        return [
            part
            for member in members[int(first) : int(last) + 1]
            for part in (member, found[member])
        ]

    def _zremrangebyscore(self, key: bytes, _: bytes, last: bytes) -> int:
        found: Any = self.data.get(key, {})
        return self._hdel(key, *[m for m, score in found.items() if float(score) <= float(last)])

    def _table(self, key: bytes) -> dict[bytes, bytes]:
        """A hash to change in place; the old one stays whole for the journal and the replica."""
        if key not in self._before:
            self._put(key, dict(self.data.get(key, {})))
        table: Any = self.data.setdefault(key, {})
        return table

    def _put(self, key: bytes, value: Value | None) -> None:
        if self.read_only:
            raise redis.exceptions.ReadOnlyError("You can't write against a read only replica.")
        self._before.setdefault(key, self.data.get(key))
        if value is None:
            self.data.pop(key, None)
        else:
            self.data[key] = value


class Network:
    """Which server answers which client, and when nobody does."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.current = Server()
        self.away_until_s = 0.0
        self.underway = 0
        """Scripts that will still run although nobody waits for them."""

    def fail_over(self, lost: int) -> None:
        """Promote a replica; clients move to it each in its own time."""
        self.current = self.current.replica(lost)


class Client(redis.Redis):
    """redis-py's client of one process, with the network between it and the server."""

    def __init__(
        self,
        network: Network,
        process: Process,
        rng: random.Random,
        note: Callable[..., None],
    ) -> None:
        super().__init__(protocol=2)
        self.moves_at_s = 0.0
        """When it hears of a failover."""
        self.faults: dict[str, float] = {}
        """What befalls the next fitting call: kind → seconds."""
        self.latency_s = lambda: 0.001
        self._network, self.process, self._rng, self._note = network, process, rng, note
        self._server = network.current

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return self._parsed(args[0], self._ask([args])[0], options)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        return _Pipeline(self, transaction)

    def run_all(self, stack: list[tuple[Any, Any]], *, transaction: bool) -> list[Any]:
        """A transaction's commands as one step, others one after the other: what goes wrong on the
        way leaves some done and some not.
        """
        commands = [args for args, _ in stack]
        if transaction:
            answers = self._ask(commands)
        else:
            answers = [self._answer_or_error(command) for command in commands]
        return [
            answer if isinstance(answer, Exception) else self._parsed(args[0], answer, options)
            for (args, options), answer in zip(stack, answers, strict=True)
        ]

    def _answer_or_error(self, command: Command) -> Any:
        try:
            return self._ask([command])[0]
        except redis.exceptions.ResponseError as error:
            return error

    def _parsed(self, name: str, answer: Any, options: dict[str, Any]) -> Any:
        options.pop("keys", None)  # for redis-py's own cache
        parse = self.response_callbacks.get(name)
        return parse(answer, **options) if parse else answer

    def _ask(self, commands: list[Command]) -> list[Any]:
        self.process.wait(self.latency_s() + self.faults.pop("slow", 0.0))
        loop, network = self._network.loop, self._network
        if loop.now_s < network.away_until_s:
            raise redis.exceptions.ConnectionError("simulated: nobody answers")
        if self._server is not network.current and loop.now_s >= self.moves_at_s:
            self._server = network.current
        server = self._server
        name = str(commands[0][0])
        is_script = name == "EVALSHA"
        if is_script and "late" in self.faults:
            after_s = self.faults.pop("late")
            self._note("{}: script times out, the server runs it {} s later", self, after_s)
            network.underway += 1
            loop.call_later(after_s, self._run_late, server, commands)
            raise redis.exceptions.TimeoutError("simulated: no answer in time")
        answers = server.run(commands)
        self._note("{}: {} -> {}", self, _named(commands), answers)
        if "lost" in self.faults:
            del self.faults["lost"]
            self._note("{}: the answer is lost", self)
            raise redis.exceptions.ConnectionError("simulated: the answer was lost")
        if is_script and "resend" in self.faults:
            self.process.wait(self.faults.pop("resend"))
            if self._server is not network.current and loop.now_s >= self.moves_at_s:
                self._server = network.current
            answers = self._server.run(commands)
            self._note("{}: sent again -> {}", self, answers)
        return answers

    def _run_late(self, server: Server, commands: list[Command]) -> None:
        self._network.underway -= 1
        with contextlib.suppress(redis.exceptions.RedisError):  # nobody hears of it
            answers = server.run(commands)
            self._note("{}: late {} -> {}", self, _named(commands), answers)

    @property
    def has_moved(self) -> bool:
        """Whether it talks to the server in force, or would with its next call."""
        return self._server is self._network.current or self._network.loop.now_s > self.moves_at_s

    def __str__(self) -> str:
        old = "" if self._server is self._network.current else " (old primary)"
        return f"{self.process.name}{old}"


class _Pipeline(Pipeline):
    def __init__(self, client: Client, transaction: bool) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, transaction, None)
        self._client = client

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        return self._client.run_all(self.command_stack, transaction=bool(self.transaction))


def _named(commands: list[Command]) -> list[Command]:
    """Scripts by their first words instead of their digest and numbers of keys."""
    return [
        [_names.get(command[1], "script"), *command[3:]] if command[0] == "EVALSHA" else command
        for command in commands
    ]


# Lua ----------------------------------------------------------------------------------------------

_lua = lua51.LuaRuntime(encoding=None, register_eval=False)
_compiled: dict[str, Any] = {}
_names = {
    hashlib.sha1(text.encode()).hexdigest(): name  # noqa: S324 - Redis's own name for it
    for name, text in (("COMMIT", scripts.COMMIT), ("RENEW", scripts.RENEW))
}
_on: Server = Server()


def run_script(server: Server, sha: str, keys: list[bytes], args: list[bytes]) -> Any:
    """Run a script on a server."""
    global _on
    script = _compiled[sha]
    if not callable(script):
        text = _bytes(script)
        script = _compiled[sha] = _lua.eval(b"function(KEYS, ARGV)\n" + text + b"\nend")
    _on = server
    return _from_lua(script(_lua.table_from(keys), _lua.table_from(args)))


def _call(name: bytes, *args: Any) -> Any:
    answer = _on._command([name.decode(), *map(_argument, args)])
    if answer is None:
        return False
    if isinstance(answer, list):
        return _lua.table_from([False if part is None else part for part in answer])
    return answer


def _argument(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b"%.17g" % value


def _from_lua(value: Any) -> Any:
    if isinstance(value, bytes) or value is None:
        return value
    if isinstance(value, bool):
        return 1 if value else None
    if isinstance(value, int | float):
        return int(value)
    return [_from_lua(value[at]) for at in range(1, len(value) + 1)]


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return value.encode() if isinstance(value, str) else b"%d" % value


_lua.globals()[b"redis"] = _lua.table_from({b"call": _call})
