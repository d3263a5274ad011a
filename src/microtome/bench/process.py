"""A model in a process of its own, which answers with seconds."""

import multiprocessing
import re
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from microtome.bench.work import Settings, Workload, find
from microtome.errors import BadInput, MicrotomeError
from microtome.loading import device_of


class Died(BadInput):
    """A process that ended without a word: no memory, or an instruction that the machine does not have."""


class Runner:
    """The other process, as this one sees it; `idle` is the memory that it had before the model came."""

    def __init__(self, engine: str, path: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, engine, path, settings), daemon=True)
        self.process.start()
        other.close()
        self.dtype, self.idle = "", 0

    def ready(self) -> None:
        """Wait until the model is loaded."""
        self.dtype, self.idle = self.answer()

    def answer(self) -> Any:
        """What the process says next; its refusals are raised here."""
        try:
            found = self.pipe.recv()
        except EOFError as error:
            raise Died("a benchmark process died: out of memory? Use fewer --batch or a shorter --prompt.") from error
        if isinstance(found, MicrotomeError):
            raise found
        return found

    def seconds(self, work: Workload) -> float:
        """Of one run."""
        self.pipe.send(work)
        return float(self.answer())

    def peak(self) -> int:
        """Bytes of memory at most so far."""
        self.pipe.send("peak")
        return int(self.answer())

    def stop(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.terminate()


def serve(pipe: Connection, engine: str, path: str, settings: Settings) -> None:
    """The other process: load a model, and time what is asked until the pipe closes."""
    torch.set_num_threads(settings.threads)
    device = device_of(settings.device)
    try:
        idle = peak_bytes(device)
        loaded = find(engine).opened(path, settings)
        pipe.send((loaded.dtype, idle))
        while True:
            asked = pipe.recv()
            pipe.send(peak_bytes(device) if asked == "peak" else loaded.seconds(asked))
    except MicrotomeError as error:
        pipe.send(error)
    except (EOFError, OSError):
        return


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held: on the accelerator where there is one.

    Linux tells the process that was started what its parent held, unless it is asked for the program's own pages.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    own = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    if own is not None:
        return int(own[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
