"""Fault tests use the stage of the service tests."""

from tests.service.conftest import stage

__all__ = ["stage"]
