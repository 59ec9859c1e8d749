"""URLs as text: what of them may be shown, and a password put into one. Opens nothing."""

import re
from urllib.parse import quote, urlsplit

from afterclick.serving.errors import ConfigError

_SAFE_HOST = r"(?:[A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?"
_SAFE_HOSTS = rf"{_SAFE_HOST}(?:,{_SAFE_HOST})*"
_SAFE_SERVER = re.compile(rf"{_SAFE_HOSTS}(?:/\d*)?")
_SAFE_SERVICE = re.compile(rf"{_SAFE_HOSTS}/[A-Za-z0-9._-]+(?:/\d*)?")
_SAFE_PATH = re.compile(r"/[A-Za-z0-9._/-]*")
_SAFE = {
    "redis": _SAFE_SERVER,
    "rediss": _SAFE_SERVER,
    "redis+sentinel": _SAFE_SERVICE,
    "rediss+sentinel": _SAFE_SERVICE,
    "unix": _SAFE_PATH,
}
"""What of a URL is plainly its place, by scheme."""


def safe_url(url: str) -> str:
    """A Redis URL fit for messages and logs: without user, password and options.

    Shows less rather than more: what is not plainly host, port and database becomes `***`.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SAFE:
        return "***"
    _, at, place = rest.rpartition("@")
    place = place.partition("?")[0]
    shown = place if _SAFE[scheme].fullmatch(place) and "password=" not in rest.lower() else "***"
    return f"{scheme}://{'***@' if at else ''}{shown}"


def places_of(hosts: str, port: int) -> list[tuple[str, int]]:
    """Hosts with their ports.

    Args:
        hosts: `host[:port],host[:port],…`
        port: of those that name none.

    Raises:
        ValueError: one is none.
    """
    places = []
    for text in hosts.split(","):
        place = urlsplit(f"//{text}")
        if not place.hostname:
            raise ValueError("no host")
        places.append((place.hostname, place.port or port))
    return places


def without_user(url: str) -> str:
    """Any other URL fit for messages and logs: without user and password; a path as it is."""
    return re.sub(r"^(\w[\w+.-]*://)[^/]*@", r"\1***@", url)


def with_password(url: str, password: str) -> str:
    """A Redis URL with its user's password in it, so that the password can come from elsewhere.

    Raises:
        ConfigError: it holds one already.
    """
    scheme, _, rest = url.partition("://")
    hosts, slash, after = rest.partition("/")
    user, _, hosts = hosts.rpartition("@")
    if ":" in user:
        raise ConfigError(
            f"redis URL {safe_url(url)}: it holds a password, and another one was given beside it; "
            "leave it in one place"
        )
    return f"{scheme}://{user}:{quote(password, safe='')}@{hosts}{slash}{after}"
