"""A worker's process: its environment, its end and its memory."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from lit_prune.atomic import write_json

ROOT = Path(__file__).parent.parent.parent
LIMIT = 2 * 3600
"""Seconds after which a worker has failed."""


def worked(command: list[str], job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a worker; its figures, with the seconds of the whole process and the memory of its children.

    Whatever ends the wait ends the worker, with all that it has started.

    Raises:
        subprocess.CalledProcessError: the process failed; its output is the end of what it said.
        TimeoutError: it went on for longer than the limit.
        ValueError: it computed with another number of threads than the job's.
    """
    job["figures"] = str(folder / "figures.json")
    write_json(folder / "job.json", job)
    log = folder / "log"
    alone = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    alone |= {"OMP_NUM_THREADS": str(job["threads"])}
    began, children = time.perf_counter(), 0
    with log.open("w") as said:
        whole = [*command, str(folder / "job.json")]
        process = psutil.Popen(whole, cwd=ROOT, env=alone, stdout=said, stderr=said, process_group=0)
        try:
            while process.poll() is None:
                if time.perf_counter() - began > LIMIT:
                    raise TimeoutError(f"it had not ended after {LIMIT / 3600:.1f} hours")
                children = max(children, memory_of_children(process))
                time.sleep(0.1)
            seconds = time.perf_counter() - began
        finally:
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, whole, log.read_text()[-3000:])
    figures: dict[str, Any] = json.loads(Path(job["figures"]).read_text())
    if figures["threads"] != job["threads"]:
        raise ValueError(f"the worker computed with {figures['threads']} threads instead of {job['threads']}")
    figures["seconds"]["process"] = seconds
    figures["peak_memory_bytes"] += children
    return figures


def memory_of_children(process: psutil.Process) -> int:
    """Resident bytes of a process's children, but of those just made, which may share all of their parent's."""
    total = 0
    try:
        for child in process.children(recursive=True):
            if time.time() - child.create_time() > 1:
                total += child.memory_info().rss
    except psutil.NoSuchProcess:  # it ended while we looked
        pass
    return total


@contextmanager
def ended_by_term() -> Iterator[None]:
    """Within, a request to end unwinds as Ctrl-C does, so that no worker stays behind."""
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
