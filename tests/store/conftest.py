"""A store wherever it may be."""

import pytest


@pytest.fixture(params=["directory", "bucket", "memory"])
def where(request, tmp_path):
    """A store's name."""
    if request.param == "bucket":
        return request.getfixturevalue("bucket")
    return str(tmp_path / "store") if request.param == "directory" else f"memory://{tmp_path.name}"
