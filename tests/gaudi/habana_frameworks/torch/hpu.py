"""What `torch.hpu` tells of the device; figures that no other device could have told."""

import torch

PEAK, FREE = 4321, 10**9


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def get_device_name(device: torch.device) -> str:
    return f"software {torch.device(device).type}"


def max_memory_allocated() -> int:
    return PEAK


def reset_peak_memory_stats() -> None:
    pass


def synchronize() -> None:
    pass


def mem_get_info(device: torch.device) -> tuple[int, int]:
    return FREE, 2 * FREE


def memory_stats(device: torch.device) -> dict[str, int]:
    return {"InUse": 0}


def manual_seed_all(seed: int) -> None:
    pass


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16]


def _is_in_bad_fork() -> bool:
    return False


Stream, Event = torch.Stream, torch.Event
