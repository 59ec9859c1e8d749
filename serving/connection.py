"""How the one writer of Redis connects: timeouts, retries, and what kind of client a URL asks for.

Knows no key. Readers connect by themselves (reader.py): they would rather fail than wait.
"""

from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

TIMEOUT_S = 5.0
"""Longest wait for one answer; a script over 256 users takes about 2 ms."""

RETRIES = 2
"""Re-sends by the client; a script sent twice recognises its own batch."""


def connect(url: str) -> Any:
    """A redis-py client for `serving.store.Store`; connects at its first command."""
    return redis.Redis.from_url(
        url,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), RETRIES),
    )
