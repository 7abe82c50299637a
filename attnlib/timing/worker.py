"""A process of its own to touch the device, which may die without taking its parent, or what was measured, with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from attnlib.core import UserError

# what cuBLAS says before it makes the context that it finds missing, and FlashAttention-4 of each kernel it compiles
OF_NO_USE = ("Attempting to run cuBLAS", "Argument aux_data")


class WorkerDied(Exception):
    """The worker process is gone, or failed in a way that leaves the device in doubt: it is not used any further."""


def leave_with_parent() -> None:
    """End this process when the one that started it has ended."""
    multiprocessing.parent_process().join()
    os._exit(1)


def serve(pipe: Connection) -> None:
    """The worker: run what is sent, `(function, arguments)`, and send back `(error or None, result)`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent
    for said in OF_NO_USE:
        warnings.filterwarnings("ignore", said)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(*arguments)))
        except UserError as error:
            pipe.send((error, None))
        except Exception as error:
            pipe.send((WorkerDied(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"), None))


class Worker:
    """A process started when first called, and replaced after it has died. It starts from a server that has imported
    this package, which takes no time after the first, and touches no GPU."""

    def __init__(self) -> None:
        self.context: Any = multiprocessing.get_context("forkserver")
        # heeded by whoever starts the server: by all or by none
        self.context.set_forkserver_preload(["attnlib.timing.preloaded"])
        self.process: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill the process, if there is one."""
        if self.process:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        self.process = None

    def call(self, function: Callable, *arguments: Any, timeout_s: float | None = None) -> Any:
        """`function(*arguments)`, run in the worker. Raises UserError as that did, WorkerDied if the process ended or
        it failed otherwise, TimeoutError after `timeout_s` seconds; after the last two the process is killed."""
        if self.process is None:
            self.pipe, theirs = self.context.Pipe()
            self.process = self.context.Process(target=serve, args=(theirs,), daemon=True)
            with theirs:
                self.process.start()
        try:
            self.pipe.send((function, arguments))
            if not self.pipe.poll(timeout_s):
                raise TimeoutError(f"not done after {timeout_s:g} s")
            error, result = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            error, result = WorkerDied(how), None
        except BaseException:  # no time left, or an interrupt: a late answer must not be taken for the next one's
            self.stop()
            raise
        if isinstance(error, WorkerDied):
            self.stop()
        if error:
            raise error
        return result

    def call_again(self, function: Callable, *arguments: Any, timeout_s: float | None = None) -> Any:
        """`call`, and again if the worker died, as the cause may lie outside: a kill, a system short of memory."""
        try:
            return self.call(function, *arguments, timeout_s=timeout_s)
        except WorkerDied:
            return self.call(function, *arguments, timeout_s=timeout_s)
