"""GGUF by llama.cpp's own converter, where it is at hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lit_prune.errors import BadInput

SCRIPT, VARIABLE = "convert_hf_to_gguf.py", "LIT_PRUNE_GGUF_CONVERTER"
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""What llama.cpp calls them."""


def find_converter(given: str | None) -> Path | None:
    """Where the converter is: where `given` or else the environment says, or on PATH; None if it is in no such place.

    Raises:
        BadInput: there is no such file.
    """
    for key, named in (("converter", given), (VARIABLE, os.environ.get(VARIABLE))):
        if named:
            path = Path(named).expanduser()
            if not path.is_file():
                raise BadInput(f"{key}: there is no file '{named}'; give llama.cpp's {SCRIPT}.")
            return path
    found = shutil.which(SCRIPT)
    return Path(found) if found else None


def command(converter: Path, folder: Path, file: Path, dtype: torch.dtype) -> list[str]:
    """What converts an ordinary folder.

    Raises:
        BadInput: GGUF has no such dtype.
    """
    if dtype not in TYPES:
        raise BadInput(f"dtype: llama.cpp's converter does not write {dtype}; give one of {', '.join(TYPES.values())}.")
    outtype = ["--outtype", TYPES[dtype]]
    return [sys.executable, str(converter), str(folder), "--outfile", str(file), *outtype]


def missing(folder: Path, file: Path, dtype: torch.dtype, packed: bool) -> BadInput:
    """What to say where there is no converter."""
    after = "an unpacked folder (--format huggingface)" if packed else f"'{folder}'"
    placeholder = Path("MODEL") if packed else folder
    words = ["python", *command(Path("llama.cpp") / SCRIPT, placeholder, file, dtype)[1:]]
    return BadInput(
        f"format: gguf needs llama.cpp's {SCRIPT}, which is neither on PATH nor named by --converter or ${VARIABLE}; "
        f"with a checkout of llama.cpp, this converts {after}: {' '.join(words)}"
    )


def convert(words: list[str], file: Path) -> None:
    """Run the converter.

    Raises:
        BadInput: it cannot convert this model.
    """
    answer = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - no shell; the user names the script
    if answer.returncode != 0 or not file.is_file():
        said = (answer.stderr.strip() or answer.stdout.strip() or "it gave no reason").splitlines()[-1]
        raise BadInput(
            f"format: {SCRIPT} could not convert this model ({said.rstrip('. ')}); see whether llama.cpp supports "
            "its architecture and tokenizer, and is of a recent version."
        )
