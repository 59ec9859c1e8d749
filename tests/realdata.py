"""Where the real data sets lie: `AFTERCLICK_DATA`, else ../shared/datasets beside the checkout."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("AFTERCLICK_DATA") or Path(__file__).parents[2] / "shared" / "datasets")


def needs_data(test):
    """Mark a test that reads them: skipped with the reason where they are missing; CI fails it."""
    skip = pytest.mark.skipif(not DATA.is_dir(), reason=f"AFTERCLICK_DATA: no folder {DATA}")
    return pytest.mark.realdata(skip(test))
