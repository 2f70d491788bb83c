"""Worker: torchao's Wanda sparsifier: one pass of the dense model with observers, then all masks at once.

It compares scores over the whole matrix, not in each row, and its score is the weight's magnitude times the sum of
squares of the input, of which it takes no root; 2:4 is its `semi_structured_block_size`.
"""

from importlib.metadata import version
from typing import Any

from benchmarks.peers.worker import AT_A_TIME, Clock, work


def prune(job: dict[str, Any], clock: Clock) -> dict[str, str]:
    """Prune by Wanda; samples go through the model without its head, four at a time."""
    with clock("import"):
        import torch
        from safetensors.torch import load_file
        from torchao.sparsity import WandaSparsifier
        from transformers import AutoModelForCausalLM
    with clock("load"):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        tokens = load_file(job["tokens"])["tokens"]
    with clock("prune"), torch.no_grad():
        if ":" in job["sparsity"]:
            sparsifier = WandaSparsifier(semi_structured_block_size=int(job["sparsity"].split(":")[1]))
        else:
            sparsifier = WandaSparsifier(sparsity_level=float(job["sparsity"]))
        inside = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
        sparsifier.prepare(model, [{"tensor_fqn": f"model.{name}.weight"} for name in inside])
        for batch in tokens.split(AT_A_TIME):
            model.model(input_ids=batch, use_cache=False)
        sparsifier.step()
        sparsifier.squash_mask()
    with clock("save"):
        model.save_pretrained(job["result"])
    return {name: version(name) for name in ("torchao", "torch", "transformers")}


if __name__ == "__main__":
    work(prune)
