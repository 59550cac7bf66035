import warnings

import pytest


@pytest.fixture(scope="session")
def ray_is_imported():
    """Ray's own modules warn when they are imported, which takes seconds and so is left to those who run a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.serve  # noqa: F401
