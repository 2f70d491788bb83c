"""What every test shares: no network, a cache of its own, and a tiny tokenizer."""

import os
import shutil
import tempfile

# before anything is imported that reads them
SCRATCH = tempfile.mkdtemp(prefix="lit-prune-tests-")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": f"{SCRATCH}/huggingface",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # or a GPU's results could not be repeated
    "LIT_PRUNE_CACHE": f"{SCRATCH}/lit-prune",
}

import json  # noqa: E402
import resource  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from functools import cache, partial  # noqa: E402
from importlib.metadata import entry_points  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast  # noqa: E402

from lit_prune.models import blocks  # noqa: E402

settings.register_profile("lit-prune", deadline=None, derandomize=True)
settings.load_profile("lit-prune")


Ask = Callable[..., dict[str, Any]]

LONG = ("test_run", "test_needs", "test_never_lost", "test_readme", "test_methods", "test_forms", "test_offload")
LONG += ("test_ranks", "test_gpu", "test_peers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that two processes end at the same time."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_unconfigure() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def remembered() -> Iterator[None]:
    """Hundreds of short runs in one process would spend a third of their time on tokenising the same few texts, and on
    looking through all installed packages for plug-ins of Lightning."""
    tokenise, made = PreTrainedTokenizerBase.__call__, {}

    def once(tokenizer: PreTrainedTokenizerBase, text: Any = None, *args: Any, **settings: Any) -> BatchEncoding:
        if args or not isinstance(text, str) or len(text) < 10_000:
            return tokenise(tokenizer, text, *args, **settings)
        key = tokenizer.backend_tokenizer.to_str(), text, tuple(sorted(settings.items()))
        if key not in made:
            made[key] = dict(tokenise(tokenizer, text, **settings))
        return BatchEncoding(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "__call__", once)
        patch.setattr("lightning.fabric.utilities.registry.entry_points", cache(entry_points))
        yield


@pytest.fixture(scope="module")
def without_plots() -> Iterator[None]:
    """For files that run `fit` often: drawing takes longer than what they look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_prune.reporting.plots.run_figures", lambda _: {})
        yield


def compile_anew(monkeypatch: pytest.MonkeyPatch, **how: str) -> None:
    """For a test, `torch.compile` has compiled no block yet; by settings of its own, if any are given."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, **how))
    monkeypatch.setattr(blocks, "_compiled", cache(blocks._compiled.__wrapped__))
    torch.compiler.reset()
    counters.clear()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As if a disk were full: no file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def ask() -> Iterator[Ask]:
    """A function that runs a command in a process of its own; see `forks`."""
    program = [sys.executable, str(Path(__file__).parent / "forks.py")]
    # or several processes would have other numbers of threads than one, and with them other last bits
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"cwd": Path(__file__).parent.parent, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(program, env=one_thread, text=True, **pipes) as server:
        assert server.stdin
        assert server.stdout
        json.loads(server.stdout.readline())

        def ask(arguments: list[str], **how: float | str) -> dict[str, Any]:
            server.stdin.write(json.dumps({"arguments": arguments, **how}) + "\n")
            server.stdin.flush()
            answer: dict[str, Any] = json.loads(server.stdout.readline())
            return answer

        yield ask
        server.stdin.close()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token a byte, 256 and 257 for start and end; adds no start token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
