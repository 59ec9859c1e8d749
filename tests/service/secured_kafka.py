"""An Apache Kafka 4 that asks who is there: TLS, client certificates, SASL and ACLs."""

import contextlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    KafkaAdminClient,
    ResourcePattern,
    ResourceType,
)

from afterclick.streams.admin import client_config
from afterclick.streams.local import Server, local_kafka
from afterclick.streams.processes import free_port
from afterclick.streams.settings import StreamsSettings
from tests.conftest import ROOT
from tests.pki import Pki

USER, WORD = "worker", "right-word-4711"


class SecuredKafka(NamedTuple):
    """Its listeners. The plain one, `server.address`, is for the test alone: everything is allowed
    there.
    """

    server: Server
    ports: dict[str, int]
    pki: Pki

    @property
    def open(self) -> StreamsSettings:
        """Settings of whoever may do everything."""
        return StreamsSettings(broker=self.server.address)

    def settings(self, protocol: str, **given: Any) -> StreamsSettings:
        """Settings that lead to a listener, with what it asks for unless `given` says otherwise."""
        fitting: dict[str, Any] = {
            "broker": f"127.0.0.1:{self.ports[protocol]}",
            "security_protocol": protocol,
        }
        if protocol.endswith("SSL"):
            fitting["ssl_cafile"] = str(self.pki.authority)
        if protocol == "SSL":
            fitting["ssl_certfile"] = str(self.pki.client)
        else:
            fitting |= {"sasl_username": USER, "sasl_password": WORD}
        return StreamsSettings(**fitting | given)

    def allow(self, principal: str, rights: list[tuple[str, str, str]]) -> None:
        """Grant rights: kind of resource, its name, operation."""
        acls = [
            ACL(
                f"User:{principal}",
                "*",
                ACLOperation[operation.upper()],
                ACLPermissionType.ALLOW,
                ResourcePattern(ResourceType[kind.upper()], name),
            )
            for kind, name, operation in rights
        ]
        with closing(KafkaAdminClient(**client_config(self.open))) as admin:
            admin.create_acls(acls)


@contextlib.contextmanager
def secured_kafka(folder: Path, pki: Pki) -> Iterator[SecuredKafka]:
    """Run it; `USER` is known under every mechanism, and has no right yet."""
    ports = {name: free_port() for name in ("SSL", "SASL_PLAINTEXT", "SASL_SSL")}
    listeners = ",".join(f"{name}://127.0.0.1:{port}" for name, port in ports.items())
    properties = {
        "listeners": listeners,
        "advertised.listeners": listeners,
        "listener.security.protocol.map": ",".join(f"{name}:{name}" for name in ports),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(pki.server),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(pki.authority),
        "listener.name.ssl.ssl.client.auth": "required",
        # Whoever shows a certificate is called by its common name, not by the whole subject.
        "ssl.principal.mapping.rules": "RULE:^.*CN=([^,]+).*$/$1/,DEFAULT",
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
    modules = "org.apache.kafka.common.security"
    for listener in ("sasl_plaintext", "sasl_ssl"):
        where = f"listener.name.{listener}"
        properties[f"{where}.plain.sasl.jaas.config"] = (
            f'{modules}.plain.PlainLoginModule required user_{USER}="{WORD}";'
        )
        for bits in ("256", "512"):
            properties[f"{where}.scram-sha-{bits}.sasl.jaas.config"] = (
                f"{modules}.scram.ScramLoginModule required;"
            )
    users = [
        argument
        for bits in ("256", "512")
        for argument in ("--add-scram", f"SCRAM-SHA-{bits}=[name={USER},password={WORD}]")
    ]
    with local_kafka(
        folder, cache=ROOT / ".cache" / "kafka", properties=properties, format_arguments=users
    ) as server:
        yield SecuredKafka(server, ports, pki)
