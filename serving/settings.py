"""What a process is told once, at start; unknown names are refused.

Names in the environment carry the package: `AFTERCLICK_SERVING__REDIS=redis://cache:6379/0`.
Only a process's `main` reads the environment; everything below is handed a settings object. A
setting whose name ends in `_password` is a secret: `…_PASSWORD_FILE` may name a file that holds it,
and no repr shows it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from afterclick.serving.address import safe_url, with_password, without_user
from afterclick.serving.errors import ConfigError
from afterclick.serving.keys import Layout

Head = Literal["click", "purchase"]
"""What a query asks for."""

S = TypeVar("S", bound=msgspec.Struct)

Scan = Literal["exact", "two-stage"]

SECRET = "_password"  # noqa: S105 - how the names of settings end that hold one
SECRET_BYTES_MAX = 4096
"""Of a file that holds one; a longer file is another one than was meant."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What settings have in common: a repr, in a log or a traceback, shows no secret."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        for name, value in shown.items():
            if name.endswith(SECRET) and value:
                shown[name] = "***"
            elif name == "redis":
                shown[name] = safe_url(value)
            elif isinstance(value, str):
                shown[name] = without_user(value)
        return list(shown.items())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"


class ServingSettings(Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of lists, releases and Redis, shared by the worker, the reader and the trainer."""

    redis: str = "redis://127.0.0.1:6379/0"
    """URL of Redis (≥ 6.2) or Valkey (≥ 7.2), `redis://user@host:6379/0`. Behind Sentinel
    `redis+sentinel://user@host:26379,host:26379/service/0`, the hosts being Sentinels. Of Redis
    Cluster one node or several, `redis://host:port,host:port`; any leads to the others. For TLS
    `rediss://…?ssl_ca_certs=FILE`, with `ssl_certfile` and `ssl_keyfile` where Redis asks for a
    certificate.
    """

    redis_password: str = ""
    """Password of the URL's user, where the URL holds none; `REDIS_PASSWORD_FILE` names a file that
    holds it instead.
    """

    layout: Layout = "single"
    """`single` for one server, with replicas and Sentinel or without; `cluster` for Redis Cluster:
    every partition's keys stand in one of its slots. The same for workers and readers.
    """

    releases: str = "releases"
    """Folder, or fsspec URL (s3://…, gs://…), that holds the releases and `current.json`."""

    releases_cache: str = ".cache/releases"
    """Local folder that releases from a URL are pulled into."""

    namespace: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "afterclick"
    """First part of every key in Redis; one namespace is one tenant."""

    head: Head = "click"
    """What lists are ranked for: the next click, or the next purchase. `purchase` needs a release
    that was trained with `purchase_weight`; another one is refused.
    """

    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Execution provider. `auto` takes CUDA where it works and says what it took; `cuda` fails
    without it.
    """

    threads: Annotated[int, Meta(ge=0, le=256)] = 1
    """Threads of one ONNX Runtime call; 0 means one per core. Several partitions folded side by
    side with one thread each beat one fold with all threads (docs/performance.md). A scan on the
    CPU takes one, whatever stands here.
    """

    scan: Scan = "exact"
    """`two-stage` reads only where vectors like the query stand, roughly first and the best
    exactly: for catalogues of some 500,000 items and more, on the CPU; needs the extra `index`.
    Lists then miss an item in a hundred or so (docs/performance.md).
    """

    precision: Literal["fp32", "fp16"] = "fp32"
    """Arithmetic of the catalogue scan; fp16 needs `provider=cuda`."""

    k: Annotated[int, Meta(ge=1, le=1000)] = 50
    """Items a reader is given at most."""

    margin: Annotated[int, Meta(ge=0, le=1000)] = 20
    """Items kept beyond `k`, so that a reader can drop what became unavailable."""

    history: Annotated[int, Meta(ge=1, le=1000)] = 50
    """Interactions kept in a user record; a new release rebuilds the state from them."""

    filter_seen: bool = False
    """Leave items of the user's kept history out of the list."""

    list_scores: bool = True
    """Whether lists say scores, which take nearly half of their bytes; `TopK` gives none then."""

    list_compression: Literal["none", "zlib"] = "none"
    """How workers store lists in Redis: JSON, or JSON under zlib, half the bytes for some 20 µs of
    CPU a list. `TopK` and `afterclick api` read both, so it can be changed at any time.
    """

    idle_ttl_s: Annotated[int, Meta(ge=0)] = 0
    """A gap between two interactions longer than this many seconds of event time resets the state;
    0 never does.
    """

    record_ttl_s: Annotated[int, Meta(ge=60)] = 90 * 86400
    """Seconds after its last write when Redis may drop a user's record and list."""

    popularity_half_life_s: Annotated[int, Meta(ge=60)] = 6 * 3600
    """Half-life of the popularity that fills lists where no release can."""

    popularity_items_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 20_000
    """Distinct items counted per partition and hour; further ones are not counted in that hour."""

    fallback_every_s: Annotated[float, Meta(gt=0)] = 3.0
    """Seconds between two renewals of the list for users without one."""

    release_poll_s: Annotated[float, Meta(gt=0)] = 1.0
    """Seconds between two looks for a new publication."""

    api_host: str = "127.0.0.1"
    """Address that `afterclick api` listens on; `0.0.0.0` for every one of the machine's."""

    api_port: Annotated[int, Meta(ge=1, le=65535)] = 8080
    """Port of `afterclick api`; several processes on one machine may share it."""


def from_environment(kind: type[S], package: str, environ: Mapping[str, str]) -> S:
    """Read one package's settings from environment variables.

    Args:
        kind: the settings class.
        package: SERVING, STREAMS or TRAINING.
        environ: usually `os.environ`.

    Raises:
        ConfigError: a name with this package's prefix is unknown, or a value is out of its range.
    """
    prefix = f"AFTERCLICK_{package}__"
    given = {
        name[len(prefix) :].lower(): value
        for name, value in environ.items()
        if name.startswith(prefix)
    }
    known = {field.name for field in msgspec.structs.fields(kind)}
    for name in known:
        if name.endswith(SECRET) and (path := given.pop(f"{name}_file", None)) is not None:
            if name in given:
                raise ConfigError(f"{prefix}{name.upper()} and …_FILE are both set: expected one")
            given[name] = _secret(f"{prefix}{name.upper()}_FILE", path)
    for name in sorted(given.keys() - known):
        raise ConfigError(
            f"{prefix}{name.upper()}: no such setting; known are {', '.join(sorted(known))}"
        )
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings {prefix}*: {error}") from error


def serving_settings(environ: Mapping[str, str]) -> ServingSettings:
    """Read `AFTERCLICK_SERVING__*`; `redis` is then complete, with the password in it."""
    settings = from_environment(ServingSettings, "SERVING", environ)
    if not settings.redis_password:
        return settings
    url = with_password(settings.redis, settings.redis_password)
    return msgspec.structs.replace(settings, redis=url, redis_password="")


def _secret(name: str, path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            secret = file.read(SECRET_BYTES_MAX + 1).decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{name}: cannot read {path!r}: {why}") from None
    if not 0 < len(secret) <= SECRET_BYTES_MAX:
        raise ConfigError(
            f"{name}: expected a password of 1 to {SECRET_BYTES_MAX} characters in {path!r}, "
            f"found {'none' if not secret else 'more'}"
        )
    return secret


class ListRules(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The settings that decide bytes of records and lists; every input entry names them whole.

    A change of one of these while a stream runs is written to the partition's inputs list, so that
    a
    replay follows it.
    """

    k: int
    margin: int
    history: int
    filter_seen: bool
    idle_ttl_s: int
    popularity_half_life_s: int
    popularity_items_max: int
    head: Head = "click"
    scan: Scan = "exact"
    list_scores: bool = True

    @classmethod
    def of(cls, settings: ServingSettings) -> "ListRules":
        """Take the deciding part of the process's settings."""
        names = [field.name for field in msgspec.structs.fields(cls)]
        return cls(**{name: getattr(settings, name) for name in names})
