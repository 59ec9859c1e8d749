"""Secrets come from the environment or a file, and no message, repr or log shows one."""

from pathlib import Path

import msgspec
import pytest
from rich.pretty import pretty_repr

from afterclick.serving.address import safe_url, with_password
from afterclick.serving.errors import ConfigError
from afterclick.serving.settings import SECRET, SECRET_BYTES_MAX, ServingSettings, serving_settings
from afterclick.streams.settings import StreamsSettings, streams_settings

WORD = "hunter2-p@ss/w:rd"
SHOWN = "hunter2"
"""The part that quoting leaves as it is."""


def test_a_file_takes_the_place_of_a_password_in_the_environment(tmp_path: Path) -> None:
    """Orchestrators mount secrets as files; an editor's newline at the end is not part of one."""
    path = tmp_path / "secret"
    path.write_text(f"{WORD}\n")

    streams = streams_settings({"AFTERCLICK_STREAMS__SASL_PASSWORD_FILE": str(path)})
    serving = serving_settings(
        {
            "AFTERCLICK_SERVING__REDIS": "rediss://worker@cache:6379/0?ssl_ca_certs=/ca.pem",
            "AFTERCLICK_SERVING__REDIS_PASSWORD_FILE": str(path),
        }
    )

    assert streams.sasl_password == WORD
    assert serving.redis == (
        "rediss://worker:hunter2-p%40ss%2Fw%3Ard@cache:6379/0?ssl_ca_certs=/ca.pem"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "found none"), (b"\n", "found none"), (b"x" * (SECRET_BYTES_MAX + 1), "found more"),
     (b"\xff\xfe", "not UTF-8")],
)  # fmt: skip
def test_a_file_that_holds_no_password_is_refused_by_the_setting_s_name(
    tmp_path: Path, content: bytes, says: str
) -> None:
    """An empty password would be tried, and the broker's answer would not name the file."""
    path = tmp_path / "secret"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=f"SASL_PASSWORD_FILE.*{says}"):
        streams_settings({"AFTERCLICK_STREAMS__SASL_PASSWORD_FILE": str(path)})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A mount that is not there is the commonest mistake."""
    path = tmp_path / "absent"

    with pytest.raises(ConfigError, match=r"REDIS_PASSWORD_FILE.*absent.*No such file"):
        serving_settings({"AFTERCLICK_SERVING__REDIS_PASSWORD_FILE": str(path)})


@pytest.mark.parametrize(
    "environ",
    [
        {"REDIS": f"redis://:{SHOWN}@cache", "REDIS_PASSWORD": SHOWN},
        {"REDIS_PASSWORD": SHOWN, "REDIS_PASSWORD_FILE": "anywhere"},
    ],
)
def test_two_places_for_one_password_are_refused(environ: dict[str, str]) -> None:
    """One of them is stale, and nobody could tell which was used."""
    with pytest.raises(ConfigError) as caught:
        serving_settings({f"AFTERCLICK_SERVING__{name}": value for name, value in environ.items()})

    assert SHOWN not in str(caught.value)


@pytest.mark.parametrize("name", ["REDIS_FILE", "NAMESPACE_FILE", "REDIS_PASSWORD_FILES"])
def test_only_secrets_come_from_files(name: str) -> None:
    """A mistyped name must not become a default, and a file is read only where one was meant."""
    with pytest.raises(ConfigError, match=f"{name}: no such setting"):
        serving_settings({f"AFTERCLICK_SERVING__{name}": "/etc/hostname"})


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("redis://cache", "redis://:pw@cache"),
        ("redis://cache:6379/0", "redis://:pw@cache:6379/0"),
        ("redis://me@a:1,b:2/0", "redis://me:pw@a:1,b:2/0"),
        ("rediss://me@[::1]:1/0?ssl_ca_certs=/a@b.pem", None),
        ("unix:///run/redis.sock", "unix://:pw@/run/redis.sock"),
        ("redis+sentinel://me@a:1,b:2/shop/0", "redis+sentinel://me:pw@a:1,b:2/shop/0"),
    ],
)
def test_a_password_goes_in_front_of_the_host_whatever_the_url(url: str, whole: str | None) -> None:
    """A path or an option may hold an @ too."""
    whole = whole or "rediss://me:pw@[::1]:1/0?ssl_ca_certs=/a@b.pem"

    assert with_password(url, "pw") == whole
    assert "pw" not in safe_url(whole)


@pytest.mark.parametrize(
    "settings",
    [
        ServingSettings(redis=f"redis://me:{SHOWN}@cache:6379/0"),
        ServingSettings(redis=f"{SHOWN}"),
        ServingSettings(redis_password=SHOWN),
        StreamsSettings(sasl_password=SHOWN),
    ],
)
def test_no_repr_of_settings_shows_a_secret(settings: msgspec.Struct) -> None:
    """Settings end up in logs, tracebacks and debuggers."""
    assert SHOWN not in repr(settings) + str(settings) + pretty_repr(settings)


@pytest.mark.parametrize("kind", [ServingSettings, StreamsSettings])
def test_every_setting_that_sounds_secret_is_treated_as_one(kind: type[msgspec.Struct]) -> None:
    """The rule goes by the name, so a new secret needs the right one."""
    names = [field.name for field in msgspec.structs.fields(kind)]
    sounds = ("password", "secret", "token", "credential", "passphrase")

    assert all(name.endswith(SECRET) for name in names if any(sound in name for sound in sounds))
