"""How the stream processes prove who they are to Kafka, and Kafka to them: settings → arguments.

Both clients, kafka-python and Faust's aiokafka, are told the same from here. Knows no topic, opens
no connection, and names a setting, never its value, where that is a secret.
"""

import ssl
from typing import Any

from afterclick.serving.errors import ConfigError
from afterclick.streams.settings import StreamsSettings

_TLS = ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
_SASL = ("sasl_username", "sasl_password")


class Hidden(str):
    """Text that a client can send and a log cannot show: kafka-python logs all its arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def kafka_arguments(settings: StreamsSettings) -> dict[str, Any]:
    """Security arguments of every kafka-python client.

    Raises:
        ConfigError: the settings contradict each other, or a file cannot be read.
    """
    context = _checked_context(settings)
    arguments: dict[str, Any] = {"security_protocol": settings.security_protocol}
    if context is not None:
        arguments["ssl_context"] = context
    if _is_sasl(settings):
        arguments["sasl_mechanism"] = settings.sasl_mechanism
        arguments["sasl_plain_username"] = settings.sasl_username
        arguments["sasl_plain_password"] = Hidden(settings.sasl_password)
    return arguments


def broker_credentials(settings: StreamsSettings) -> Any:
    """The same for Faust, which hands it to aiokafka; None for a broker that asks nothing.

    Raises:
        ConfigError: as `kafka_arguments`.
    """
    import faust  # the trainer and the readers of the log need no Faust

    context = _checked_context(settings)
    if _is_sasl(settings):
        return faust.SASLCredentials(
            mechanism=settings.sasl_mechanism,
            username=settings.sasl_username,
            password=Hidden(settings.sasl_password),
            ssl_context=context,  # with one, Faust speaks SASL_SSL
        )
    return None if context is None else faust.SSLCredentials(context)


def _is_sasl(settings: StreamsSettings) -> bool:
    return settings.security_protocol.startswith("SASL_")


def _checked_context(settings: StreamsSettings) -> ssl.SSLContext | None:
    """The TLS context, None without TLS, once nothing contradicts."""
    for name in _SASL:
        if _is_sasl(settings) != bool(getattr(settings, name)):
            raise _contradiction(settings, name, expected=_is_sasl(settings), by="SASL_")
    if settings.security_protocol.endswith("SSL"):
        return _context(settings)
    for name in _TLS:
        if getattr(settings, name):
            raise _contradiction(settings, name, expected=False, by="SSL")
    if not settings.ssl_check_hostname:
        raise _contradiction(settings, "ssl_check_hostname", expected=False, by="SSL")
    return None


def _context(settings: StreamsSettings) -> ssl.SSLContext:
    if settings.ssl_keyfile and not settings.ssl_certfile:
        raise ConfigError(
            f"{_env('ssl_keyfile')} is set, {_env('ssl_certfile')} is not: a key alone proves "
            "nothing; set both, or neither"
        )
    name = "ssl_cafile"
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile or None)
        if settings.ssl_certfile:
            name = "ssl_keyfile" if settings.ssl_keyfile else "ssl_certfile"
            # An empty password fails on an encrypted key; without one OpenSSL asks the terminal.
            context.load_cert_chain(
                settings.ssl_certfile, settings.ssl_keyfile or None, password=""
            )
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{_env(name)}: expected a PEM file that can be read, unencrypted, "
            f"{getattr(settings, name)!r} gives: {error}"
        ) from error
    context.check_hostname = settings.ssl_check_hostname
    return context


def _contradiction(settings: StreamsSettings, name: str, *, expected: bool, by: str) -> ConfigError:
    return ConfigError(
        f"{_env(name)}: expected {'a value' if expected else 'none'}, because "
        f"{_env('security_protocol')} is {settings.security_protocol!r}; set the one, or choose a "
        f"protocol {'without' if expected else 'with'} {by}"
    )


def _env(name: str) -> str:
    return f"AFTERCLICK_STREAMS__{name.upper()}"
