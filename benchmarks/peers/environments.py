"""An environment for each tool, made once in the cache; how large it is and how long the tool takes to start.

llmcompressor 0.14.0.1 is the highest release at the time of writing. It asks for transformers of at most 5.17.0 and no
certain torch, and both peers work with torch 2.13.0 on a CPU, so that all tools compute with the same torch.
"""

import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

from lit_prune.atomic import write_text
from lit_prune.published import cache_folder

ROOT = Path(__file__).parent.parent.parent
TORCH = "torch==2.13.0"
REQUIRED = {
    "llmcompressor": [TORCH, "llmcompressor==0.14.0.1"],
    "torchao": [TORCH, "torchao==0.18.0", "transformers==5.17.0"],
    "lit-prune": ["--constraint", str(ROOT / "constraints.txt"), "--editable", str(ROOT)],
}
"""What pip installs; ours only to see how large it is and how it starts: its work is done by the Python that runs."""

CONTENTS = {"lit-prune": [ROOT / "constraints.txt", ROOT / "pyproject.toml"]}
"""Files that say what pip installs: with another text an environment is made anew."""

START = {
    "llmcompressor": ["python", "-c", "from llmcompressor import oneshot"],
    "torchao": ["python", "-c", "from torchao.sparsity import WandaSparsifier"],
    "lit-prune": ["lit-prune", "fit", "--help"],
}


class NotMade(Exception):
    """An environment cannot be made, so that no cell of its tool can be measured."""


def environment(tool: str) -> Path:
    """The environment's folder, made if it is not there; one that was not finished is gone on with.

    Raises:
        NotMade: pip or Python cannot.
    """
    said = [*REQUIRED[tool], *(file.read_text() for file in CONTENTS.get(tool, []))]
    name = sha256(" ".join(said).encode()).hexdigest()[:12]
    folder = cache_folder() / "peers" / f"{tool}-{name}"
    if not (folder / "ready").exists():
        print(f"making an environment for {tool}", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)  # noqa: S603
            subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *REQUIRED[tool]], check=True)  # noqa: S603
        except (subprocess.CalledProcessError, OSError) as error:
            raise NotMade(f"no environment for {tool}: {error}") from error
        write_text(folder / "ready", "")
    return folder


def python(tool: str) -> str:
    """The Python that a tool's worker runs in."""
    return str(environment(tool) / "bin" / "python") if tool in ("llmcompressor", "torchao") else sys.executable


def started(tool: str) -> tuple[float, int]:
    """Seconds that a tool takes to start, warm, and the bytes of all files of its environment."""
    folder = environment(tool)
    program, *arguments = START[tool]
    for _ in range(2):  # the first compiles what pip has not, and brings the files to memory
        began = time.perf_counter()
        command = [str(folder / "bin" / program), *arguments]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603
        seconds = time.perf_counter() - began
    files = (file.lstat() for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return seconds, sum({status.st_ino: status.st_size for status in files}.values())
