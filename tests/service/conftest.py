"""The stage of service tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from afterclick.streams.settings import StreamsSettings
from tests.service.stage import Stage


@pytest.fixture
def stage(
    topics: StreamsSettings, redis_url: str, namespace: str, tmp_path: Path
) -> Iterator[Stage]:
    """Fresh topics, namespace and releases folder on the run's servers."""
    stage = Stage(topics, redis_url, namespace, tmp_path)
    yield stage
    stage.close()
