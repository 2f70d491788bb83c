"""What a run takes: seconds by stage, peak memory."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Stopwatch:
    """Wall-clock seconds by stage.

    Args:
        earlier: what an interrupted run has spent already.
    """

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float, earlier or {})

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the seconds that the body takes to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - start

    @property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        return dict(self._seconds)


def peak_memory_bytes() -> dict[str, int | None]:
    """The highest resident memory of this process, and the highest allocated memory of the GPU, if one is used."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {"host": host, "device": torch.cuda.max_memory_allocated() if used else None}
