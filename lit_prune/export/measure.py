"""How large and how fast a model is, dense and pruned, in every layout that this machine has for it."""

import inspect
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_prune.errors import BadInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lit_prune.export.source import Source

Dtype = Literal["float32", "float16", "bfloat16"]


KINDS = {"prompt": "prompt, tokens/s", "generation": "generation, tokens/s"}


@dataclass
class Measured:
    """A model in one layout.

    Attributes:
        model: "dense" or "pruned".
        layout: of its sparse layers in memory.
        file_bytes: of the weights on disk.
        packed_bytes: of the same in the packed format; None where that saves nothing.
        memory_bytes: of the weights in memory.
        speeds: tokens a second, of each kind, each time that it was measured.
    """

    model: str
    layout: str
    file_bytes: int
    packed_bytes: int | None
    memory_bytes: int
    speeds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})


def measure(
    model: str,
    output: str | None = None,
    dtype: Dtype | None = None,
    dense: str | None = None,
    device: str = "auto",
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 7,
) -> None:
    """Measure a model beside the dense one, print a table, and write it if a folder is named.

    Args:
        model: as for `export`
        output: a new folder for measured.json and measured.md; null only prints
        dtype: of the weights in memory; null takes float32 on a CPU, and what they are stored in elsewhere
        dense: the model to compare with; null takes the one that the run was made of
        device: where to run, such as cpu or cuda:1; auto takes the accelerator if there is one
        prompt_tokens: length of the prompt, which is processed at once
        new_tokens: tokens that are generated after it, one by one
        repeats: how often each is measured, in turn with the others

    Raises:
        BadInput: a setting cannot work, or memory is short.
    """
    for name, count in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if count < 1:
            raise BadInput(f"{name}: {count} is too few; give at least 1.")

    import torch

    from lit_prune.atomic import built_whole
    from lit_prune.export.source import Source
    from lit_prune.resources import named_device
    from lit_prune.run_folder import new_folder

    folder = new_folder(output, "output") if output else None
    place, chosen = named_device(device), getattr(torch, dtype) if dtype else None
    pruned = Source.open(model)
    reference = dense or (pruned.run.checkpoint if pruned.run else None)
    if reference is None:
        raise BadInput(f"dense: '{model}' is no run, which would name its dense model; give one to compare with.")
    sources = {"dense": Source.open(reference, "dense"), "pruned": pruned}
    _check_pair(sources, prompt_tokens + new_tokens)
    loaded, left_out = _load_all(sources, place, chosen)
    load_before = _load_average()
    _take_turns(loaded, prompt_tokens, new_tokens, repeats)
    report = {
        "model": model,
        "dense": reference,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "dtype": str(loaded[0][1].dtype).removeprefix("torch."),
        "machine": _machine(place),
        "load_average": [load_before, _load_average()],
        "left_out": left_out,
        "measured": [asdict(measured) for measured, _ in loaded],
    }
    text = as_markdown(report)
    if folder:
        with built_whole(folder) as draft:
            draft.mkdir()
            (draft / "measured.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            (draft / "measured.md").write_text(text, encoding="utf-8")
    print(text, end="")


def _check_pair(sources: "Mapping[str, Source]", tokens: int) -> None:
    """Two models of one kind, which have places for so many tokens.

    Raises:
        BadInput: they are not, or have not.
    """
    from lit_prune.models import load_config

    kinds = []
    for source in sources.values():
        config = load_config(str(source.folder)).get_text_config()
        kinds.append((config.model_type, config.num_hidden_layers, config.hidden_size))
        places = getattr(config, "max_position_embeddings", None)
        if places is not None and tokens > places:
            raise BadInput(
                f"prompt_tokens: with new_tokens they are {tokens}, but '{source.given}' has {places} positions; "
                "give fewer."
            )
    if len(set(kinds)) > 1:
        raise BadInput(
            f"dense: '{sources['dense'].given}' is no model of the same shape as '{sources['pruned'].given}'; give the "
            "one that it was made from."
        )


def _load_all(
    sources: "Mapping[str, Source]", device: "torch.device", dtype: "torch.dtype | None"
) -> "tuple[list[tuple[Measured, PreTrainedModel]], dict[str, str]]":
    """Every model in every layout that it can have here, and for each other layout the reason why not."""
    import torch

    from lit_prune.export.layouts import LAYOUTS
    from lit_prune.export.loading import load, weights_bytes
    from lit_prune.export.source import files_bytes
    from lit_prune.modules.memory import available_memory

    loaded = []
    left_out: dict[str, str] = {}
    chosen = dtype or (torch.float32 if device.type == "cpu" else None)
    for name, source in sources.items():
        files, packed = files_bytes(source.folder), _packed_bytes(source)
        needed = sum(tensor.numel() * (chosen or tensor.dtype).itemsize for _, tensor in source.tensors())
        for layout in LAYOUTS if name == "pruned" else LAYOUTS[:1]:
            if needed > (free := available_memory(device)):
                raise BadInput(
                    f"device: the models need {needed / 1e9:.2f} GB more, but {free / 1e9:.2f} GB are free; "
                    "give another device, or a smaller dtype."
                )
            try:
                model = load(source.folder, layout=layout, device=device, dtype=chosen)
            except BadInput as reason:
                if layout == "dense":
                    raise
                left_out[layout] = str(reason).removeprefix("layout: ")
                continue
            loaded.append((Measured(name, layout, files, packed, weights_bytes(model)), model))
    return loaded, left_out


def _packed_bytes(source: "Source") -> int | None:
    """By packing it, into a folder that does not stay."""
    from lit_prune.export.packed import NothingSaved, write_packed
    from lit_prune.export.source import files_bytes

    with tempfile.TemporaryDirectory(prefix="lit-prune-") as folder:
        try:
            write_packed(source.tensors(), Path(folder), 5 * 10**9)
        except NothingSaved:
            return None
        return files_bytes(Path(folder))


def _take_turns(
    loaded: "list[tuple[Measured, PreTrainedModel]]", prompt_tokens: int, new_tokens: int, repeats: int
) -> None:
    """Measure each once in every round, beginning with another one each time; the first round warms up."""
    import torch

    for turn in range(-1, repeats):
        first = turn % len(loaded)
        for measured, model in loaded[first:] + loaded[:first]:
            generator = torch.Generator().manual_seed(turn + 1)  # the same prompt for all
            tokens = torch.randint(model.config.get_text_config().vocab_size, (1, prompt_tokens), generator=generator)
            seconds = _seconds(model, tokens.to(model.device), new_tokens)
            if turn >= 0:
                measured.speeds["prompt"].append(prompt_tokens / seconds[0])
                measured.speeds["generation"].append(new_tokens / seconds[1])


def _seconds(model: "PreTrainedModel", tokens: "torch.Tensor", new_tokens: int) -> tuple[float, float]:
    """Of the pass over a prompt, and of the tokens that are then generated greedily, one pass each."""
    import torch

    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def now() -> float:
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        return time.perf_counter()

    with torch.no_grad():
        start = now()
        answer = model(input_ids=tokens, use_cache=True, **last)
        middle = now()
        for _ in range(new_tokens):
            token = answer.logits[:, -1:].argmax(-1)
            answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True, **last)
        return middle - start, now() - middle


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table, with all that one has to know about it."""
    from lit_prune.reporting.wording import short_name

    rows = [["model", "layout", "file, MB", "packed file, MB", "weights in memory, MB", *KINDS.values()]]
    rows.append(["---", "---", *["---:"] * 5])
    base = report["measured"][0]
    for one in report["measured"]:
        sizes = [one["file_bytes"], one["packed_bytes"], one["memory_bytes"]]
        cells = ["-" if size is None else f"{size / 1e6:.1f}" for size in sizes]
        cells += [_speed(one["speeds"][kind], base["speeds"][kind]) for kind in KINDS]
        rows.append([one["model"], one["layout"], *cells])
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    machine = report["machine"]
    before, after = report["load_average"]
    lines += [
        "",
        f"`{report['model']}` beside `{short_name(report['dense'])}`, weights in {report['dtype']} in memory. Tokens a "
        f"second: the median of {report['repeats']} turns (lowest to highest; times the dense model's median), one "
        f"text at a time, {report['prompt_tokens']} tokens of prompt at once, then {report['new_tokens']} generated; "
        "all in turn with each other.",
        "",
        f"On {machine['device']}, {machine['threads']} of {machine['cores']} cores used, "
        f"torch {machine['versions']['torch']}, transformers {machine['versions']['transformers']}.",
    ]
    if before > 0.5:
        lines += [
            f"**Other work ran on this machine** (its load was {before:.1f} before and {after:.1f} at the end), so "
            "that speeds are lower and spread wider than they would be alone."
        ]
    lines += [f"Left out: {layout} ({reason.rstrip('.')})." for layout, reason in report["left_out"].items()]
    return "\n".join(lines) + "\n"


def _speed(speeds: list[float], dense: list[float]) -> str:
    median = statistics.median(speeds)
    return f"{median:.1f} ({min(speeds):.1f} to {max(speeds):.1f}; {median / statistics.median(dense):.2f}×)"


def _load_average() -> float:
    """How many processes wanted to run, on average over the last minute."""
    return os.getloadavg()[0]


def _machine(device: "torch.device") -> dict[str, Any]:
    import torch

    from lit_prune.resources import accelerator_name, processor

    return {
        "device": accelerator_name(device) or processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
