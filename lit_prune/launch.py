"""Starting the processes that share one run's work, and ending them together."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from subprocess import Popen
from threading import Event, Thread

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lit_prune.errors import BadInput
from lit_prune.method import Training, refusals

REFUSED = 2
"""The exit status of a process that cannot go on with what it was given, and has said why."""

FIRST = "LIT_PRUNE_FIRST_PROCESS"
"""The environment variable that tells those that it launches which the first process is."""

GRACE = 2.0
"""Seconds within which a process finds out by itself that another has ended."""

PATIENCE = timedelta(days=1)
"""How long a process waits for another: as long as a block is trained, where each trains one of its own."""


@contextmanager
def joined(training: Training, gone: Callable[[], None]) -> Iterator[None]:
    """Start the other processes that are asked for, unless torchrun or SLURM did, and be one with them.

    Args:
        training: its Trainers say how many there are.
        gone: says that one of them has died, which ends all others.

    Raises:
        BadInput: Lightning refuses the settings, or who has started the processes does not fit them; there are too few
            cores, or the strategy is not DDP.
    """
    with refusals():
        trainer = training.trainer_for(logger=False)
    strategy, cores = trainer.strategy, os.cpu_count() or 1
    if trainer.world_size == 1:
        if TorchElasticEnvironment.detect() and (started := TorchElasticEnvironment().world_size()) > 1:
            raise BadInput(
                f"trainer.devices: torchrun has started {started} processes, but each would do the whole run by itself "
                f"on one device; give --trainer.devices {os.environ['LOCAL_WORLD_SIZE']}."
            )
        yield
        return
    launcher = strategy.launcher
    if not isinstance(strategy, DDPStrategy) or not isinstance(launcher, _SubprocessScriptLauncher):
        raise BadInput(f"trainer.strategy: {type(strategy).__name__} is not supported; give ddp.")
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
        raise BadInput(f"trainer.devices: '{trainer.num_devices}' does not fit; give at most one a core, {cores}.")
    strategy._timeout = max(strategy._timeout or PATIENCE, PATIENCE)
    with ExitStack() as watch:
        if not isinstance(strategy.cluster_environment, LightningEnvironment) or trainer.local_rank == 0:
            os.environ[FIRST] = str(os.getpid())
        else:  # before it waits for the first process, which may have ended already
            watch.enter_context(watched([], gone, int(os.environ.get(FIRST, os.getppid()))))
        try:
            with refusals():
                launcher.launch(strategy.setup_environment, trainer=trainer)
        except BaseException:
            for process in launcher.procs:
                process.kill()
            raise
        launched = launcher.procs.copy()
        launcher.procs.clear()  # or Lightning, which looks at these too, would kill this process without a word
        if launched:
            watch.enter_context(watched(launched, gone))
        yield


@contextmanager
def watched(launched: Sequence[Popen[bytes]], gone: Callable[[], None], parent: int = 0) -> Iterator[None]:
    """End this process when another one of its run ends, for it may compute for hours before it asks for it.

    Args:
        launched: by this process; if none, it was launched itself, and looks after the process that did so.
        gone: says that one has died; one that has refused to go on has said so itself.
        parent: the number of that process; of no meaning if others were launched.
    """
    over = Event()

    def ended() -> set[int]:
        """The exit statuses of those that have not ended well."""
        return {status for process in launched if (status := process.poll())}

    def look() -> None:
        while not ended() and (launched or os.getppid() == parent):
            if over.wait(0.5):
                return
        if not over.wait(GRACE):
            refused = ended() == {REFUSED}
            end_all()
            if not refused:
                gone()
            os._exit(REFUSED if refused else 1)

    def end_all() -> None:
        for process in launched:
            process.kill()

    Thread(target=look, name="watch", daemon=True).start()
    try:
        yield
    except BadInput:
        end_all()  # what this process is about to say is all that has to be said
        raise
    except Exception:
        # talking with a process that has ended fails; why it has is for that process to say
        deadline = time.monotonic() + 2 * GRACE
        while not ended() and time.monotonic() < deadline:
            time.sleep(0.1)
        if ended() == {REFUSED}:
            end_all()
            raise SystemExit(REFUSED) from None
        raise
    finally:
        over.set()
