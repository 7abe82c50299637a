"""What only the report needs: from rows to tables, figures, claims, HTML and PDF."""

import os
from multiprocessing import forkserver, parent_process
from pathlib import Path

try:
    Path.home()
except RuntimeError:  # a container's user without a name: Jupyter, matplotlib and PyTorch's compiler want a home
    home = Path(__file__).parent.parent / "build" / "home"
    home.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HOME": str(home), "LOGNAME": "nobody"}

# set by report.build: a worker's imports go on beside the notebook's own; a worker starts none itself
if "ATTNLIB_MEASURES" in os.environ and parent_process() is None:
    forkserver.set_forkserver_preload(["attnlib.timing.preloaded"])
    forkserver.ensure_running()
