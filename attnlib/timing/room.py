"""How much memory is free: what a new allocation can get, of a GPU, or of the host within a container's limits."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch

# of a control group: its limit, what is in use, and of that what the kernel gives back (pages of files not used lately)
VERSION_2 = "memory.max", "memory.current", "inactive_file"
VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def groups(process: Path, root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of the control groups that a process is in, from its own up to the root, with their files' names. In
    a container that sees its group as the root, the path that the kernel tells is not there, and the root is it."""
    for line in process.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", VERSION_1) if controllers else (root, VERSION_2)
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                yield folder, names


def container_free(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the tightest limit on this process's control groups leaves, None where there is no limit."""
    found = []
    with suppress(OSError, ValueError):  # no such system, or one that hides it
        for folder, (limit, used, given_back) in groups(process, root):
            with suppress(OSError, ValueError):  # "max", or a group without this controller
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
                pages = re.search(rf"^{given_back} (\d+)$", (folder / "memory.stat").read_text(), re.M)
                found.append(room + (int(pages[1]) if pages else 0))
    return min(found, default=None)


def memory_free(device: str | torch.device) -> int:
    """Bytes that a new allocation can get, with what PyTorch holds unused: of a GPU up to the share of it that PyTorch
    is allowed (`torch.cuda.set_per_process_memory_fraction`); on the CPU of the container, if any."""
    if torch.device(device).type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        index = torch.device(device).index  # for which "cuda" will not do
        at = torch.cuda.current_device() if index is None else index
        allowed = int(torch.cuda.get_per_process_memory_fraction(at) * whole)
        held = torch.cuda.memory_reserved(device)
        return max(0, min(free, allowed - held)) + held - torch.cuda.memory_allocated(device)
    free, limited = psutil.virtual_memory().available, container_free()
    return free if limited is None else max(0, min(free, limited))
