"""Processes that share a sequence, started by torchrun, and what chapter 6 measures in them."""

import os
import re
import subprocess
import sys
from pathlib import Path

from attnlib.core import UserError

HERE_BEFORE = Path(__file__).parent.parent  # the folder of the project


def together(script: str | Path, ranks: int, *arguments, timeout_s: float = 300.0, options=("--standalone",)):
    """Run a script in `ranks` processes by torchrun. Raises UserError, in one line, when one of them failed or they took
    too long; then all of them are ended."""
    how = [*options, "--nproc-per-node", str(ranks), str(script), *map(str, arguments)]
    paths = os.pathsep.join(filter(None, (str(HERE_BEFORE), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *how],
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=timeout_s)[1]
    except BaseException as error:
        process.terminate()  # torchrun ends the others before itself
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise UserError(f"{ranks} ranks were not done after {timeout_s:g} s") from None
        raise
    if process.returncode:
        root = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", said, re.S)
        errors = re.findall(r"^\[rank\d+\]: (\w*(?:Error|Exception)\b.*)", said, re.M)
        who = f"rank {root[1]} of {ranks} ended with exit code {root[2]}" if root else f"{ranks} ranks failed"
        raise UserError(": ".join([who, *errors[:1]]))
