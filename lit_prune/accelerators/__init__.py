"""Hardware that Lightning does not know: importing this makes it known."""

from lit_prune.accelerators.hpu import HPUAccelerator, HPUDDPStrategy, SingleHPUStrategy, on_gaudi

__all__ = ["HPUAccelerator", "HPUDDPStrategy", "SingleHPUStrategy", "on_gaudi"]
