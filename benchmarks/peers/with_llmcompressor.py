"""Worker: llmcompressor's modifiers through `oneshot`, as its examples do, but with our tokens instead of a text."""

from importlib.metadata import version
from typing import Any

from benchmarks.peers.worker import AT_A_TIME, Clock, work


def prune(job: dict[str, Any], clock: Clock) -> dict[str, str]:
    """Prune by Magnitude, Wanda or SparseGPT; samples go through the model four at a time, where its default is one.

    `MagnitudePruningModifier` is made for training: it makes its masks, but nothing that `oneshot` does applies them,
    and what it saves is dense. The saved weights show it, and so does the table.
    """
    with clock("import"):
        import torch
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.pruning import MagnitudePruningModifier, WandaPruningModifier
        from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    with clock("load"):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        tokens = load_file(job["tokens"])["tokens"]
        rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    with clock("prune"):
        grouped = ":" in job["sparsity"]
        share = 0.5 if grouped else float(job["sparsity"])
        if job["method"] == "Magnitude":
            modifier = MagnitudePruningModifier(
                targets=[name for name, module in model.named_modules() if is_pruned(name, module)],
                init_sparsity=share,
                final_sparsity=share,
                start=0.0,
                end=1.0,
                update=1.0,
                mask_structure=job["sparsity"] if grouped else "unstructured",
            )
        else:
            kind = {"Wanda": WandaPruningModifier, "SparseGPT": SparseGPTModifier}[job["method"]]
            structure = job["sparsity"] if grouped else "0:0"
            # the plain name would not match, and the head be pruned too
            modifier = kind(sparsity=share, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
        oneshot(
            model=model,
            dataset=Dataset.from_dict(rows),
            recipe=modifier,
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
            shuffle_calibration_samples=False,
            batch_size=AT_A_TIME,  # sequences are equally long, so none is cut or padded
        )
    with clock("save"):
        model.save_pretrained(job["result"], save_compressed=False)
    return {name: version(name) for name in ("llmcompressor", "torch", "transformers")}


def is_pruned(name: str, module: Any) -> bool:
    """Whether a module is a linear layer of a block."""
    return type(module).__name__ == "Linear" and "lm_head" not in name


if __name__ == "__main__":
    work(prune)
