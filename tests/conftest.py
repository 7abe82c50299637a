"""Fixtures shared by the tests."""

import pytest
import torch

from attnlib import device as dev
from attnlib.sweep import Worker

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped, with a reason, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def worker():
    with Worker() as worker:
        yield worker


@pytest.fixture(scope="session")
def machine():
    return dev.describe("cpu")
