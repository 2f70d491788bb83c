"""What every worker does alike: read its job, take the time of its stages, write its figures.

Standard library and torch alone, since workers run in the peers' environments too, where lit-prune is not installed.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AT_A_TIME = 4
"""Sequences that go through the model at a time, to take statistics."""


class Clock:
    """Seconds by stage, in the order in which the stages were first entered."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add what the body takes to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def work(prune: Callable[[dict[str, Any], Clock], dict[str, str]]) -> None:
    """Do the job in the file that the command line names.

    A job has the `model`'s folder, a file of `tokens`, a `method` and its `sparsity`, how many `epochs` are trained,
    the folder for the `result`, and the file for the `figures`.

    Args:
        prune: does it, and gives the versions of what it used.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["figures"]).write_text(json.dumps(measured(prune, job)))


def measured(prune: Callable[[dict[str, Any], Clock], dict[str, str]], job: dict[str, Any]) -> dict[str, Any]:
    """The figures of a job: seconds by stage, memory, versions, threads."""
    clock = Clock()
    versions = prune(job, clock)
    import torch  # not before, since its import is part of what is measured

    figures = {"seconds": clock.seconds, "peak_memory_bytes": peak(), "versions": versions}
    return figures | {"threads": torch.get_num_threads()}


def peak() -> int:
    """The highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
