"""What a run takes: seconds by stage, peak memory, a device."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from lit_prune.errors import BadInput


class Stopwatch:
    """Wall-clock seconds by stage; stages may contain one another, but none contains itself.

    Args:
        earlier: what an interrupted run has spent already; None for a stage that it did not reach.
    """

    def __init__(self, earlier: Mapping[str, float | None] | None = None) -> None:
        self._seconds = {stage: seconds for stage, seconds in (earlier or {}).items() if seconds is not None}
        self._started: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the seconds that the body takes to a stage."""
        self._started[stage] = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self.seconds[stage]
            del self._started[stage]

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, those that are still going on included."""
        now = time.perf_counter()
        going_on = {stage: self._seconds.get(stage, 0.0) + now - start for stage, start in self._started.items()}
        return self._seconds | going_on


def peak_memory_bytes() -> dict[str, int | None]:
    """The highest resident memory of this process, and the highest allocated memory of the GPU, if one is used."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {"host": host, "device": torch.cuda.max_memory_allocated() if used else None}


def named_device(name: str) -> torch.device:
    """The device that a name stands for; `auto` takes the accelerator if there is one.

    Raises:
        BadInput: this machine has no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the first use is what fails
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BadInput(f"device: '{name}' cannot be used ({reason}); give auto or cpu.") from error
    return device
