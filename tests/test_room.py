"""The memory that is free: in containers less than the machine's, and more than what is not in use."""

import pytest
import torch

from attnlib.timing import room

GIB = 2**30


@pytest.fixture
def container(tmp_path):
    """Write files below a root of control groups, and where the process is; what `container_free` says."""

    def free(process, **folders):
        for folder, files in folders.items():
            place = tmp_path / "root" / folder.replace("__", "/")
            place.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (place / name).write_text(str(text))
        (tmp_path / "process").write_text(process)
        return room.container_free(tmp_path / "process", tmp_path / "root")

    return free


def version_2(limit, used, inactive=0):
    stat = f"anon 5\ninactive_file {inactive}\nactive_file 7\n"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def version_1(limit, used, inactive=0):
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def test_pages_of_files_are_given_back(container):
    """16 GiB, of which 15.5 are in use, of those 12.5 by pages that the kernel gives back when asked for memory."""
    own = version_2(16 * GIB, int(15.5 * GIB), int(12.5 * GIB))
    assert container("0::/here\n", here=own) == 13 * GIB


def test_the_tightest_of_all_groups_above_counts(container):
    folders = {"a": version_2(10 * GIB, 8 * GIB), "a__b": version_2("max", GIB), "a__b__c": version_2(6 * GIB, GIB)}
    assert container("0::/a/b/c\n", **folders) == 2 * GIB


def test_a_group_of_version_1_counts_as_well(container):
    process = "12:cpu,cpuacct:/x\n4:memory:/jobs/7\n"
    assert container(process, memory__jobs__7=version_1(4 * GIB, 3 * GIB, GIB)) == 2 * GIB


def test_a_container_that_sees_its_group_as_the_root_is_understood(container):
    """The kernel tells the path as the host sees it, which is not there."""
    assert container("0::/docker/0123\n", **{".": version_2(2 * GIB, GIB)}) == GIB


def test_without_a_limit_there_is_none(container):
    assert container("0::/\n", **{".": version_2("max", GIB)}) is None
    assert container("no such file format") is None


def test_never_less_than_nothing(monkeypatch):
    monkeypatch.setattr(room, "container_free", lambda: -1)
    assert room.memory_free("cpu") == 0


def test_a_gpu_has_no_more_room_than_pytorch_is_allowed(monkeypatch):
    """140 GiB, of which 135 are free, and a process that may have a tenth, holds 4 GiB, and uses 1 of them."""
    seen = {"mem_get_info": (135 * GIB, 140 * GIB), "get_per_process_memory_fraction": 0.1}
    seen |= {"memory_reserved": 4 * GIB, "memory_allocated": GIB}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name, answer in seen.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert room.memory_free("cuda") == (14 - 1) * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert room.memory_free("cuda") == (135 + 4 - 1) * GIB


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_capped_allocator_gives_what_it_is_said_to_give(device):
    torch.cuda.set_per_process_memory_fraction(0.02, 0)
    try:
        free = room.memory_free(device)
        assert free < 0.03 * torch.cuda.get_device_properties(device).total_memory
        torch.empty(free - 2**22, dtype=torch.int8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(free + 2**22, dtype=torch.int8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        torch.cuda.empty_cache()
