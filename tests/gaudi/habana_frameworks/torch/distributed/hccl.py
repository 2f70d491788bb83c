"""Intel's collectives."""

told: list[dict[str, int]] = []


def initialize_distributed_hpu(world_size: int, rank: int, local_rank: int) -> None:
    told.append({"world_size": world_size, "rank": rank, "local_rank": local_rank})
