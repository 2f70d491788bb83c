"""Importing this makes the device known to PyTorch, as on a Gaudi."""

import software_device
import torch._dynamo

from habana_frameworks.torch import hpu

marks: list[str] = []
"""Step marks, each as the operation that was computed last before."""

compiled: list[object] = []
"""Graphs that were given to the compiler."""

software_device.install(hpu)


def mark_step() -> None:
    marks.append(software_device.last)


@torch._dynamo.register_backend
def hpu_backend(graph, inputs):
    """Computes a graph operation by operation."""
    compiled.append(graph)
    return graph.forward
