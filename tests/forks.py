"""A process that has imported everything and forks a child for every command, which may be killed in between.

Started as a program, it reads one command a line as JSON: `arguments` of lit-prune, and when to kill it: `seconds`
after its start, or at the `write`-th file or folder that comes into being, `before` or after it gets its name. It
answers each with a line of JSON: the exit `status` (negative: the signal), the `seconds` taken and the names that
`writes` gave.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def child(command: dict[str, Any], writes: int) -> None:
    """Run a command; what it writes is counted through a pipe."""
    from lit_prune.cli import main

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    replace, count = Path.replace, 0

    def counted(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == command.get("write") and command["before"]:
            os.kill(os.getpid(), signal.SIGKILL)
        result = replace(path, target)
        os.write(writes, f"{target.name}\n".encode())
        if count == command.get("write"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = counted
    status = 1
    try:
        main(command["arguments"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0
    finally:
        os._exit(status)


def run(command: dict[str, Any]) -> dict[str, Any]:
    """Fork a child, wait for it or kill it."""
    began = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        child(command, writing)
    os.close(writing)
    if seconds := command.get("seconds"):
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # nothing happens to one that has ended: nobody has waited for it yet
    with os.fdopen(reading) as written:
        names = written.read().split()
    _, status = os.waitpid(pid, 0)
    return {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began, "writes": names}


if __name__ == "__main__":
    import lit_prune.fit  # noqa: F401
    from lit_prune.reporting import plots

    plots.run_figures = lambda _: {}  # which takes half of a short run's time
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
