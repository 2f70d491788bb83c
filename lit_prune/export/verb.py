"""The verb `export`: a result in another format, onto a hub, or measured.

Whatever is slow to import is imported when it is needed, so that `--help` is quick.
"""

import inspect
import re
from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from lit_prune.atomic import built_whole
from lit_prune.cli import VERBS
from lit_prune.complaints import nearest, sentence
from lit_prune.errors import BadInput
from lit_prune.export.measure import Dtype, measure

if TYPE_CHECKING:
    import torch

    from lit_prune.export.source import Source

FORMATS = ("huggingface", "packed", "gguf")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    model: str,
    output: str | None = None,
    format: str = "huggingface",
    dtype: Dtype | None = None,
    shard_size: str = "5GB",
    push_to_hub: str | None = None,
    private: bool = False,
    converter: str | None = None,
) -> None:
    """Write a model into a new folder.

    Args:
        model: a finished run's folder, a Hugging Face folder or hub id, a packed folder, or a .gguf file
        output: the folder to write; it must not exist
        format: huggingface (an ordinary folder), packed (masks and kept values, for storage), or gguf (for llama.cpp)
        dtype: of the weights; null leaves them as they are
        shard_size: greatest size of a file of weights, such as 500MB
        push_to_hub: NAME or OWNER/NAME on the hub, to upload the folder to
        private: whether only its owner may see what is uploaded
        converter: llama.cpp's convert_hf_to_gguf.py; null takes $LIT_PRUNE_GGUF_CONVERTER, or the one on PATH

    Raises:
        BadInput: a setting cannot work, or does not fit the model.
    """
    if format not in FORMATS:
        raise _no_such_format(format)
    if output is None:
        raise BadInput("These settings are missing: output; give the folder to write.")
    size = _bytes(shard_size)
    for key, given, other in (("converter", converter, format == "gguf"), ("private", private, push_to_hub)):
        if given and not other:
            needed = "--format gguf" if key == "converter" else "--push_to_hub"
            raise BadInput(f"{key}: this setting does nothing without {needed}; leave it out, or give that too.")

    import torch

    from lit_prune.export import gguf, hub, packed
    from lit_prune.export.card import card
    from lit_prune.export.source import CARD, Source, files_bytes
    from lit_prune.models.shards import write_shards
    from lit_prune.run_folder import new_folder

    folder = new_folder(output, "output")
    chosen: torch.dtype | None = getattr(torch, dtype) if dtype else None
    name = hub.free_name(push_to_hub) if push_to_hub else None
    script = gguf.find_converter(converter) if format == "gguf" else None
    source = Source.open(model)
    if format == "gguf" and script is None:
        raise gguf.missing(source.folder, folder / f"{folder.name}.gguf", chosen or source.dtype, source.packed)
    with built_whole(folder) as draft:
        draft.mkdir()
        if format == "gguf":
            assert script is not None
            _write_gguf(source, draft, script, chosen)
        else:
            source.copy_side_files(draft, chosen)
            tensors = source.tensors(chosen)
            if format == "packed":
                packed.write_packed(tensors, draft, size)
            else:
                write_shards(draft, tensors, size)
        if source.run or format == "gguf" or not (draft / CARD).is_file():
            text = card(source.run, model, format, name or folder.name)
            (draft / CARD).write_text(text, encoding="utf-8")
    written, before = files_bytes(folder), files_bytes(source.folder)
    share = f"{written / before:.1%} of the {before / 1e6:.1f} MB before"
    print(f"'{folder}' holds {written / 1e6:.1f} MB of weights, {share}.")
    if name:
        print(f"It is uploaded to {hub.push(folder, name, private)}")


def _write_gguf(source: "Source", draft: Path, script: Path, dtype: "torch.dtype | None") -> None:
    """One file, by way of an ordinary folder if the model is packed."""
    from lit_prune.export import gguf
    from lit_prune.models.shards import write_shards

    folder = source.folder
    if source.packed:
        folder = draft.parent / "unpacked"  # which goes with the draft's own folder
        folder.mkdir()
        source.copy_side_files(folder)
        write_shards(folder, source.tensors(), UNITS["GB"])
    file = draft / f"{draft.name}.gguf"
    gguf.convert(gguf.command(script, folder, file, dtype or source.dtype), file)


def _no_such_format(given: str) -> BadInput:
    if given in ("semi_structured", "csr"):
        return BadInput(
            f"format: {given} is a layout in memory and not of files; export as huggingface or packed, and load that "
            f'with lit_prune.load(FOLDER, layout="{given}").'
        )
    return BadInput(f"format: there is no '{given}'{nearest(given, FORMATS) or '; give ' + ' or '.join(FORMATS) + '.'}")


def _bytes(size: str) -> int:
    parts = re.fullmatch(r"(\d+)\s*([KMG]?B|)", size.upper())
    if parts is None or not int(parts[1]):
        raise BadInput(f"shard_size: '{size}' is no size; give a number of bytes such as 500MB or 5GB.")
    return int(parts[1]) * UNITS[parts[2]]


def main(arguments: list[str]) -> None:
    """Parse and run `lit-prune export ...`.

    Raises:
        BadInput: a setting is unknown, missing or cannot work.
    """
    parser = ArgumentParser(
        prog="lit-prune export", description=VERBS["export"].summary, exit_on_error=False, allow_abbrev=False
    )
    parser.add_function_arguments(export, as_group=False, as_positional=True)
    parser.add_argument("--measure", action="store_true", help="only measure sizes and speeds; with the settings below")
    parser.add_function_arguments(measure, as_group=False, skip={"model", "output", "dtype"})
    try:
        settings = parser.parse_args(arguments[1:])
    except ArgumentError as error:
        raise BadInput(sentence(str(error), parser.get_defaults().keys(), {}, "export")) from error
    from transformers.utils.logging import disable_progress_bar

    chosen = settings.as_dict()
    verb, other = (measure, export) if chosen.pop("measure") else (export, measure)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    own, others = ({*inspect.signature(function).parameters} for function in (verb, other))
    defaults = parser.get_defaults().as_dict()
    for key in others - own:
        if chosen[key] != defaults[key]:
            only = "cannot be given with --measure" if verb is measure else "is for --measure alone"
            raise BadInput(f"{key}: this setting {only}; leave it out.")
    try:
        verb(**{key: chosen[key] for key in own})
    except BadInput as error:  # what is `model.checkpoint` to fit is `model` here
        raise BadInput(re.sub(r"^model\.checkpoint:", "model:", str(error))) from error
