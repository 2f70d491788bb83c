"""What a run takes: seconds and peak memory by stage, and the machine and device that it takes them on."""

import platform
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lit_prune import ranks
from lit_prune.errors import BadInput, reason

Peak = dict[str, int | None]
"""Bytes by place, host and device; None where they were not measured."""


class Stopwatch:
    """Wall-clock seconds and peak memory by stage; stages may contain one another, but none contains itself.

    A stage ends when an accelerator has done what it was given there.

    Args:
        earlier: seconds that an interrupted run has spent already; None for a stage that it did not reach.
        peaks: its peak memory by stage.

    Attributes:
        peaks: peak memory by stage, of those that were entered.
    """

    def __init__(
        self, earlier: Mapping[str, float | None] | None = None, peaks: Mapping[str, Peak] | None = None
    ) -> None:
        self._seconds = {stage: seconds for stage, seconds in (earlier or {}).items() if seconds is not None}
        self._started: dict[str, float] = {}
        self.peaks = dict(peaks or {})

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the seconds that the body takes to a stage, and keep its peak memory."""
        self._credit_memory()
        _wait_for_accelerator()
        self._started[stage] = time.perf_counter()
        try:
            yield
        finally:
            _wait_for_accelerator()
            self._seconds[stage] = self.seconds[stage]
            self._credit_memory()
            del self._started[stage]

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, those that are still going on included."""
        now = time.perf_counter()
        going_on = {stage: self._seconds.get(stage, 0.0) + now - start for stage, start in self._started.items()}
        return self._seconds | going_on

    def _credit_memory(self) -> None:
        """Count the highest memory since the last call as that of all stages going on, and begin anew."""
        peak = _peak_since_last()
        for stage in self._started:
            known = self.peaks.get(stage, {})
            self.peaks[stage] = {place: _higher(known.get(place), peak[place]) for place in peak}


def peak_memory_bytes() -> Peak:
    """The highest resident memory of this process, and the highest allocated memory of the accelerator in use, if any.

    Where a Stopwatch is used, only since it last looked.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    if found:
        host = int(found[1]) * 1024
    else:  # on Linux this would count what the process was forked from as well
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        host = peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, others in KiB
    return {"host": host, "device": in_use.max_memory_allocated() if (in_use := _in_use()) else None}


def machine(device: torch.device) -> dict[str, Any]:
    """What seconds depend on: the processor, how many processes share it, their threads, and the accelerator if any."""
    shared = {"processes": ranks.count(), "threads": torch.get_num_threads()}
    return {"cpu": processor(), **shared, "accelerator": accelerator_name(device)}


def accelerator_name(device: torch.device) -> str | None:
    """As the accelerator tells it, or the device's type; None for the CPU."""
    tell = getattr(getattr(torch, device.type, None), "get_device_name", lambda _: device.type)
    return None if device.type == "cpu" else str(tell(device))


def named_device(name: str) -> torch.device:
    """The device that a name stands for; `auto` takes the accelerator if there is one, but no Apple GPU.

    Raises:
        BadInput: this machine has no such device, or it lacks float64.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found if found and found.type != "mps" else torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "mps":
            raise BadInput(f"device: '{name}' lacks float64, in which sums are kept; give auto or cpu.")
        torch.zeros(1, device=device).item()  # the first use is what fails
    except ModuleNotFoundError as error:
        raise BadInput(f"device: '{name}' needs a package that is not installed; give auto or cpu.") from error
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device: '{name}' cannot be used ({reason(error)}); give auto or cpu.") from error
    return device


def _peak_since_last() -> Peak:
    """Peak memory since this was last called; unknown on the host where a kernel cannot begin anew."""
    peak = peak_memory_bytes()
    if in_use := _in_use():
        in_use.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: what was highest is forgotten
    except OSError:
        peak["host"] = None
    return peak


def _wait_for_accelerator() -> None:
    """Until the accelerator in use, which computes beside this process, has done all it was given."""
    if in_use := _in_use():
        in_use.synchronize()


def _higher(one: int | None, other: int | None) -> int | None:
    known = [peak for peak in (one, other) if peak is not None]
    return max(known) if known else None


def _in_use() -> Any:
    """The module of the accelerator in use, such as `torch.cuda`, if it counts its memory."""
    device = torch.accelerator.current_accelerator()
    there = getattr(torch, device.type, None) if device else None
    return there if there and hasattr(there, "max_memory_allocated") and there.is_initialized() else None


def processor() -> str:
    """The processor's name, as exactly as the system tells it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
