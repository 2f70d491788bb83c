"""Intel Gaudi (HPU), which Lightning has dropped: an accelerator, and strategies for one device and for several.

Written from Intel's documentation (docs.habana.ai: theory of operations, runtime variables, distributed backend), and
tested on a software device, never on a Gaudi. A Gaudi runs a program in one of two ways, which Intel's variable
PT_HPU_LAZY_MODE chooses before its package is imported:

- 0: operation by operation, with whole models compiled by torch.compile; the default here.
- 1, lazy: operations pile up to a graph until a value is asked for, or a step mark ends it.
"""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lit_prune.errors import BadInput

PACKAGE = "habana_frameworks"
DEVICE = "hpu"
LAZY = "PT_HPU_LAZY_MODE"


def bridge(name: str = "hpu") -> ModuleType:
    """A module of Intel's package, which makes the device known to PyTorch when it is first imported."""
    os.environ.setdefault(LAZY, "0")  # Intel's own default has changed between releases
    import_module(f"{PACKAGE}.torch.core")
    return import_module(f"{PACKAGE}.torch.{name}")


def lazy() -> bool:
    """Whether operations pile up until a step mark."""
    return os.environ.get(LAZY) == "1"


class HPUAccelerator(Accelerator):
    """Gaudis; each process computes on one, which has no number."""

    def setup_device(self, device: torch.device) -> None:
        """Refuse other devices."""
        if device.type != DEVICE:
            raise MisconfigurationException(f"the accelerator {DEVICE} cannot run on {device}.")

    def teardown(self) -> None:
        """Nothing is left to be cleaned up."""

    def get_device_stats(self, device: str | int | torch.device) -> dict[str, Any]:
        """Bytes and counts of the device's memory."""
        stats: dict[str, Any] = bridge().memory_stats(device)
        return stats

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int:
        """How many; `-1` is all.

        Raises:
            BadInput: it is not said how many, but which: for that there is Intel's HABANA_VISIBLE_MODULES.
        """
        count = HPUAccelerator.auto_device_count() if str(devices) == "-1" else devices
        if not str(count).isdigit() or not int(str(count)):
            raise BadInput(
                f"trainer.devices: '{devices}' does not fit; give how many, and say which in HABANA_VISIBLE_MODULES."
            )
        return int(str(count))

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """One device for each process."""
        return [torch.device(DEVICE)] * devices

    @staticmethod
    def auto_device_count() -> int:
        """How many there are."""
        return int(bridge().device_count()) if HPUAccelerator.is_available() else 0

    @staticmethod
    def is_available() -> bool:
        """Whether Intel's package is installed and finds a device."""
        return find_spec(PACKAGE) is not None and bool(bridge().is_available())

    @staticmethod
    def name() -> str:
        """What `--trainer.accelerator` calls it."""
        return DEVICE


class _OnGaudi(Strategy):
    """What both strategies add to Lightning's: mixed precision on the right device, compilation, step marks.

    Attributes:
        compile: whether what a LightningModule consists of is compiled for a training; not in lazy mode.
    """

    compile: bool

    @property
    def precision_plugin(self) -> Precision:
        """As Lightning has chosen it, but for this device: Lightning's own choice would lower nothing on a Gaudi."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if isinstance(precision_plugin, MixedPrecision):
            if precision_plugin.precision != "bf16-mixed":
                raise MisconfigurationException(
                    f"precision {precision_plugin.precision} is not supported on {DEVICE}; give bf16-mixed."
                )
            precision_plugin = MixedPrecision("bf16-mixed", device=DEVICE)
        self._precision_plugin = precision_plugin

    def setup(self, trainer: L.Trainer) -> None:
        """Compile the parts of what is trained, in place."""
        super().setup(trainer)
        if self.compile and not lazy() and trainer.training and self.lightning_module:
            for part in self.lightning_module.children():
                part.compile(backend="hpu_backend")

    def post_backward(self, closure_loss: Tensor) -> None:
        """End the graph of the passes forward and back."""
        super().post_backward(closure_loss)
        _mark_step()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """End the graph of the update."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        _mark_step()
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """End the graph of a batch."""
        output = super().validation_step(*args, **kwargs)
        _mark_step()
        return output


class SingleHPUStrategy(_OnGaudi, SingleDeviceStrategy):
    """One Gaudi.

    Args:
        compile: whether torch.compile is used, unless in lazy mode.
        precision_plugin: in which precision steps are computed.
    """

    strategy_name = "hpu_single"

    def __init__(self, compile: bool = True, precision_plugin: Precision | None = None) -> None:
        super().__init__(torch.device(DEVICE), precision_plugin=precision_plugin)
        self.compile = compile


class HPUDDPStrategy(_OnGaudi, DDPStrategy):
    """Several Gaudis, a process for each, which exchange gradients by Intel's collectives (HCCL).

    Args:
        compile: whether torch.compile is used, unless in lazy mode.
        precision_plugin: in which precision steps are computed.
        kwargs: of Lightning's DDPStrategy.
    """

    strategy_name = "hpu_ddp"

    def __init__(self, compile: bool = True, precision_plugin: Precision | None = None, **kwargs: Any) -> None:
        super().__init__(precision_plugin=precision_plugin, **({"process_group_backend": "hccl"} | kwargs))
        self.compile = compile

    def setup_distributed(self) -> None:
        """Say which process this is, by which Intel's package finds its Gaudi, before the processes meet."""
        self.set_world_ranks()
        bridge("distributed.hccl").initialize_distributed_hpu(
            world_size=self.world_size, rank=self.global_rank, local_rank=self.local_rank
        )
        super().setup_distributed()

    def determine_ddp_device_ids(self) -> None:
        """None, as for a CPU: those are for CUDA's streams."""


def _mark_step() -> None:
    if lazy():
        bridge("core").mark_step()


def on_gaudi(settings: dict[str, Any]) -> dict[str, Any]:
    """A Trainer's settings with the strategy that `auto` stands for on a Gaudi; other accelerators' are left alone.

    Args:
        settings: the Trainer's, as far as they are given.

    Raises:
        BadInput: there is no Gaudi, Intel's package is missing, or the number of devices is none.
    """
    accelerator = settings.get("accelerator")
    if accelerator != DEVICE and not isinstance(accelerator, HPUAccelerator):
        return settings
    if find_spec(PACKAGE) is None:
        raise BadInput(
            f"trainer.accelerator: {DEVICE} needs Intel's package {PACKAGE}, which is not installed; run in Intel's "
            "container for Gaudi, or give cpu."
        )
    if not HPUAccelerator.is_available():
        raise BadInput(f"trainer.accelerator: {DEVICE} is asked for, but no Gaudi is found; give cpu.")
    if settings.get("strategy", "auto") != "auto":
        return settings
    devices = settings.get("devices", "auto")
    count = HPUAccelerator.parse_devices(-1 if devices == "auto" else devices)
    several = count > 1 or settings.get("num_nodes", 1) > 1
    return settings | {"strategy": HPUDDPStrategy.strategy_name if several else SingleHPUStrategy.strategy_name}


AcceleratorRegistry.register(DEVICE, HPUAccelerator, description="Intel Gaudi")
for _strategy in (SingleHPUStrategy, HPUDDPStrategy):
    StrategyRegistry.register(_strategy.strategy_name, _strategy, description=_strategy.__doc__ or "")
