"""Hardware that Lightning does not know, which importing this makes known; and the precision that suits hardware."""

from lit_prune.accelerators.hpu import HPUAccelerator, HPUDDPStrategy, SingleHPUStrategy, on_gaudi
from lit_prune.accelerators.precision import in_precision

__all__ = ["HPUAccelerator", "HPUDDPStrategy", "SingleHPUStrategy", "in_precision", "on_gaudi"]
