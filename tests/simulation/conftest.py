"""Releases that the simulation folds with."""

import pytest

from tests.simulation.releases import Releases


@pytest.fixture(scope="session")
def tiny_releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    """Random weights, 4 units: what `make simulate` runs with."""
    return Releases(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def exported_releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    """As the trainer exports them; torch is imported only where they are used."""
    from tests.simulation.exported import write_exported_release

    return Releases(tmp_path_factory.mktemp("exported"), write_exported_release)


@pytest.fixture(scope="session")
def blend_releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    """With a memory that moves."""
    return Releases(tmp_path_factory.mktemp("blend"), blend=True)
