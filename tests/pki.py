"""Certificates of an authority that only the tests know, made anew in every run."""

from pathlib import Path
from typing import NamedTuple

import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)


class Pki(NamedTuple):
    """PEM files; key and certificate stand in one file."""

    authority: Path
    server: Path
    """For 127.0.0.1 and localhost."""
    client: Path
    stranger: Path
    """An authority that signed none of these."""


def write_pki(folder: Path, *, client: str = "client") -> Pki:
    """Make an authority, and a certificate for each side; `client` is the one's common name."""
    authority, stranger = trustme.CA(), trustme.CA()
    pki = Pki(*(folder / f"{name}.pem" for name in Pki._fields))
    authority.cert_pem.write_to_path(pki.authority)
    stranger.cert_pem.write_to_path(pki.stranger)
    for path, issued in (
        (pki.server, authority.issue_cert("127.0.0.1", "localhost")),
        (pki.client, authority.issue_cert("client@example.org", common_name=client)),
    ):
        # Kafka reads keys in PKCS#8 only, which trustme does not write.
        key = load_pem_private_key(issued.private_key_pem.bytes(), password=None)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        path.write_bytes(pem + chain)
    return pki
