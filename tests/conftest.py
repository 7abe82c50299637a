"""What the tests share: the devices there are and those of data/, a worker process, and the machine at hand."""

import os

import pytest
import torch

from attnlib.timing.machine import describe
from attnlib.timing.worker import Worker
from report import stored

COMMITTED = [device for device in stored.devices() if not device.endswith("-quick")]  # which nobody commits
CPU_DATA = next(device for device in COMMITTED if stored.machine_of(device).is_cpu)
GPU = torch.cuda.is_available()
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if GPU else [])]

# most tests are of small tensors, where threads wait for each other longer than they work: many times as long on a busy
# machine, or beside other processes of pytest-xdist. The processes that a test starts take it from the environment
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header():
    """Say what is left out, once."""
    return None if GPU else "no CUDA GPU: what is tested on each device is tested on the CPU alone"


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped, with a reason, where there is no GPU. The longest come first, so that of several
    workers none is left alone with them."""
    items.sort(key=lambda item: "test_replay" not in item.nodeid)
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(params=DEVICES)
def device(request):
    """Each kind of device that is there."""
    return request.param


@pytest.fixture(scope="session")
def worker():
    """A process that touches the device, for tests that leave it alive."""
    with Worker() as worker:
        yield worker


@pytest.fixture(scope="session")
def machine():
    """The CPU at hand."""
    return describe("cpu")


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
