"""A process that has imported everything and forks a child for every command, which may be killed in between.

Started as a program, it reads one command a line as JSON: `arguments` of lit-prune, and when to kill it: `seconds`
after its start, or at the `write`-th file or folder that comes into being, `before` or after it gets its name. It
answers each with a line of JSON: the exit `status` (negative: the signal), the `seconds` taken and the `writes`, the
names that files and folders got. With `ranks` as many processes run the command, as torchrun would start them, of which
the first is killed; `others` is a list of the others' status and the files that they opened to write in. What they all
say is added to the file `said`, if there is one. What takes longer than `LIMIT` is killed: processes that wait for each
other would wait for ever. Plots are not drawn.
"""

import gc
import json
import os
import signal
import socket
import sys
import time
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

LIMIT = 120
"""Seconds."""


def child(command: dict[str, Any], writes: int) -> None:
    """Run a command; what it writes is counted through a pipe."""
    from lit_prune.cli import main

    said = os.open(command.get("said", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(said, 1)
    os.dup2(said, 2)
    replace, count = Path.replace, 0

    def counted(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == command.get("write") and command["before"]:
            os.kill(os.getpid(), signal.SIGKILL)
        result = replace(path, target)
        os.write(writes, f"{target}\n".encode())
        if count == command.get("write"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            os.write(writes, f"{arguments[0]}\n".encode())

    if os.environ.get("RANK", "0") == "0":
        Path.replace = counted
    else:
        sys.addaudithook(opened)
    status = 1
    try:
        main(command["arguments"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0
    finally:
        os._exit(status)


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As torchrun sets it."""
    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    found = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", **local}
    return {key: str(value) for key, value in found.items()}


def fork(command: dict[str, Any], rank: int, port: int) -> tuple[int, int]:
    """A child that runs a command: its number, and where it tells what it writes."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        if "ranks" in command:
            os.environ |= environment(rank, command["ranks"], port)
        child(command, writing)
    os.close(writing)
    return pid, reading


def run(command: dict[str, Any]) -> dict[str, Any]:
    """Fork what runs a command, wait for it or kill it."""
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (pid, reading), *others = [fork(command, rank, port) for rank in range(command.get("ranks", 1))]
    if seconds := command.get("seconds"):
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # nothing happens to one that has ended: nobody has waited for it yet
    limit = Timer(LIMIT, lambda: [os.kill(child, signal.SIGKILL) for child in (pid, *(pid for pid, _ in others))])
    limit.start()
    (status, names), *rest = [waited(*child) for child in ((pid, reading), *others)]
    limit.cancel()
    return {"status": status, "others": rest, "seconds": time.monotonic() - began, "writes": names}


def waited(pid: int, reading: int) -> tuple[int, list[str]]:
    """A child's exit status, and the names that its writes gave."""
    with os.fdopen(reading) as written:
        names = written.read().split()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), names


def warm_up() -> None:
    """What is imported, compiled and looked for once in a process, no child does again."""
    import torch.utils.tensorboard  # noqa: F401
    import transformers
    from lightning.fabric.utilities import registry

    import lit_prune.fit  # noqa: F401
    from lit_prune.reporting import plots

    plots.run_figures = lambda _: {}  # which takes half of a short run's time
    registry.entry_points = cache(registry.entry_points)  # plug-ins of Lightning, for which it looks with every Trainer
    registry.entry_points(group="lightning.pytorch.callbacks_factory")
    transformers.AutoModelForCausalLM.from_pretrained(Path(__file__).parent.parent / "tiny" / "model")
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    warm_up()
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
