"""Settings of Kafka's security: what clients are told, and which combinations are refused."""

import ssl
from pathlib import Path

import faust
import pytest
import trustme

from afterclick.serving.errors import ConfigError
from afterclick.streams.admin import client_config
from afterclick.streams.security import broker_credentials, kafka_arguments
from afterclick.streams.settings import StreamsSettings

WORD = "hunter2"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ca.pem, cert.pem, key.pem and both.pem."""
    folder = tmp_path_factory.mktemp("pki")
    authority = trustme.CA()
    client = authority.issue_cert("worker@example.org")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    client.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    client.private_key_pem.write_to_path(folder / "key.pem")
    client.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    return folder


def settings(**given: object) -> StreamsSettings:
    return StreamsSettings(**given)  # type: ignore[arg-type]


def test_without_security_nothing_is_asked_of_the_clients() -> None:
    """A broker on this machine is the first that anybody meets."""
    assert kafka_arguments(settings()) == {"security_protocol": "PLAINTEXT"}
    assert broker_credentials(settings()) is None


@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_both_clients_are_told_the_same(protocol: str, mechanism: str) -> None:
    """A worker reads clicks by the one and writes dead letters by the other."""
    given = settings(
        security_protocol=protocol,
        sasl_mechanism=mechanism,
        sasl_username="worker",
        sasl_password=WORD,
    )

    told = kafka_arguments(given)
    credentials = broker_credentials(given)

    assert told["security_protocol"] == credentials.protocol.value == protocol
    assert told["sasl_mechanism"] == credentials.mechanism.value == mechanism
    assert told["sasl_plain_username"] == credentials.username == "worker"
    assert told["sasl_plain_password"] == credentials.password == WORD
    assert ("ssl_context" in told) == (credentials.ssl_context is not None)
    assert ("ssl_context" in told) == (protocol == "SASL_SSL")


@pytest.mark.parametrize("files", [("both.pem", ""), ("cert.pem", "key.pem")])
def test_a_certificate_may_stand_with_its_key_or_beside_it(
    pki: Path, files: tuple[str, str]
) -> None:
    """Both ways are common."""
    given = settings(
        security_protocol="SSL",
        ssl_cafile=str(pki / "ca.pem"),
        ssl_certfile=str(pki / files[0]),
        ssl_keyfile=str(pki / files[1]) if files[1] else "",
    )

    context = kafka_arguments(given)["ssl_context"]

    assert isinstance(broker_credentials(given), faust.SSLCredentials)
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1, "one authority of our own, and none of the system's"


def test_the_host_s_name_may_be_left_unchecked_but_never_its_certificate() -> None:
    """A broker behind an address of its own is a case; an unverified one is no TLS at all."""
    given = settings(security_protocol="SSL", ssl_check_hostname=False)

    context = kafka_arguments(given)["ssl_context"]

    assert not context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"sasl_username": "worker"}, "SASL_USERNAME"),
        ({"sasl_password": WORD}, "SASL_PASSWORD"),
        ({"security_protocol": "SSL", "sasl_username": "worker"}, "SASL_USERNAME"),
        ({"security_protocol": "SASL_SSL", "sasl_password": WORD}, "SASL_USERNAME"),
        ({"security_protocol": "SASL_SSL", "sasl_username": "worker"}, "SASL_PASSWORD"),
        ({"ssl_cafile": "ca.pem"}, "SSL_CAFILE"),
        ({"ssl_certfile": "cert.pem"}, "SSL_CERTFILE"),
        ({"ssl_check_hostname": False}, "SSL_CHECK_HOSTNAME"),
        ({"security_protocol": "SSL", "ssl_keyfile": "key.pem"}, "SSL_CERTFILE"),
        ({"security_protocol": "SSL", "ssl_cafile": "absent.pem"}, "SSL_CAFILE.*No such file"),
        ({"security_protocol": "SSL", "ssl_cafile": "key.pem"}, "SSL_CAFILE"),
        ({"security_protocol": "SSL", "ssl_certfile": "ca.pem"}, "SSL_CERTFILE"),
        (
            {"security_protocol": "SSL", "ssl_certfile": "ca.pem", "ssl_keyfile": "key.pem"},
            "SSL_KEYFILE.*MISMATCH",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    pki: Path, given: dict[str, object], named: str
) -> None:
    """A password that is given and not sent, or a check that is not made, is a silent hole."""
    values = {
        name: str(pki / value) if isinstance(value, str) and value.endswith(".pem") else value
        for name, value in given.items()
    }
    for turn in (client_config, broker_credentials):
        with pytest.raises(ConfigError, match=f"AFTERCLICK_STREAMS__{named}") as caught:
            turn(settings(**values))
        assert WORD not in str(caught.value)


def test_arguments_can_be_logged() -> None:
    """kafka-python writes all of an admin client's into its debug log."""
    given = settings(security_protocol="SASL_SSL", sasl_username="worker", sasl_password=WORD)

    assert WORD not in f"{client_config(given)} {broker_credentials(given)!r}"
