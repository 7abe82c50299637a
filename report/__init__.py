"""What only the report needs: from rows to tables, figures, claims, HTML and PDF."""

import os
from multiprocessing import forkserver

if "ATTNLIB_MEASURES" in os.environ:  # set by report.build: a worker's imports go on beside the notebook's own
    forkserver.set_forkserver_preload(["attnlib.timing.preloaded"])
    forkserver.ensure_running()
