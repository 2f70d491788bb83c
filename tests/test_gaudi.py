"""Gaudi without a Gaudi: the same runs on the CPU and on a device that only looks like one (tests/gaudi)."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from test_forms import SEQUENCE, tiny
from torch import Tensor, nn

from lit_prune.accelerators import HPUAccelerator, HPUDDPStrategy, SingleHPUStrategy, hpu, on_gaudi
from lit_prune.cli import main
from lit_prune.data import Streams
from lit_prune.models import BlockCall
from lit_prune.modules import Reconstruction
from lit_prune.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
LAZY = {"PT_HPU_LAZY_MODE": "1"}
NO_COMPILATION = ["--trainer.strategy=lit_prune.accelerators.SingleHPUStrategy", "--trainer.strategy.compile=false"]

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_acc"), reason="this PyTorch cannot be given a device that is written in Python"
)

# What the other process does: it alone has the software device


def begin() -> None:
    """Intel's package lies there, but nobody has imported it; nor must anything be computed on the CPU before."""
    sys.path.insert(0, str(Path(__file__).parent / "gaudi"))


def package(name: str) -> Any:
    return importlib.import_module(f"habana_frameworks.torch.{name}")


def command(*arguments: str, lazy: bool = False, **patches: Any) -> tuple[int, str]:
    """Exit status of lit-prune and what it says on standard error; patches are by full name, with _ for a dot."""
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"PT_HPU_LAZY_MODE": str(int(lazy))}))
        stack.enter_context(mock.patch("lit_prune.run.Run._report"))
        stack.enter_context(contextlib.redirect_stderr(said))
        stop = stack.enter_context(pytest.raises(SystemExit))
        main(list(arguments))
    return stop.value.code or 0, said.getvalue()


@pytest.fixture(scope="module")
def there() -> Iterator[Callable[..., Any]]:
    """Calls a function in the other process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin) as process:
        yield lambda *call: process.submit(*call).result()


@pytest.fixture(scope="module")
def fit(tmp_path_factory, tiny_tokenizer) -> Callable[..., list[str]]:
    """The command that prunes a model of two blocks, with grouped queries and tied embeddings."""
    model, text = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("text") / "text.txt"
    tiny().half().save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    text.write_text((ROOT / "tiny" / "text" / "calibration.txt").read_text(encoding="utf-8")[:4_000], encoding="utf-8")
    given = {"model.checkpoint": model, "data.source": text, "data.samples": 6, "data.validation_samples": 2}
    given |= {"data.sequence_length": SEQUENCE, "evaluation.texts": f"[{text}]", "evaluation.window_length": SEQUENCE}
    given |= {"evaluation.windows": 2, "trainer.max_epochs": 2, "data.batch_size": 4}
    command = [
        "fit",
        f"--config={ROOT / 'configs' / 'tiny.yaml'}",
        *(f"--{key}={value}" for key, value in given.items()),
    ]
    return lambda folder, device, *more: [*command, f"--output_dir={folder}", f"--trainer.accelerator={device}", *more]


def weights(folder: Path) -> dict[str, Tensor]:
    files = (folder / "model").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FORMS = {
    "wanda, block": [],
    "sparsegpt, none": ["--model.mask=SparseGPT", "--model.reconstruction=none"],
    "cross_block": ["--model.reconstruction=cross_block"],
    "layer": ["--model.reconstruction=layer"],
    "sublayer with adapters": ["--model.reconstruction=sublayer", "--model.trained=adapters", "--model.rank=2"],
    "no global propagation": ["--model.global_propagation=false"],
    "independent": ["--model.independent=true"],
    "ADMM, conjugate gradients": ["--model.mask=ADMM", "--model.solver=ConjugateGradient"],
    "ALPS, 2:4": ["--model.mask=ALPS", "--model.sparsity=2:4"],
    "gradients": ["--model.mask=GBLM", "--model.solver=ADMM", "--model.reconstruction=none"],
    "gradients of the model": ["--model.mask=GBLM", "--model.mask.backward=model", "--model.reconstruction=none"],
    "gradients of blocks": ["--model.mask=RegionalGradient", "--model.reconstruction=none"],
    "neurons": ["--model.mask=MutualInformation", "--model.reconstruction=none"],
    "allocation, offloaded": ["--model.allocation=OWL", "--model.offload=true", "--model.sparsity=0.5"],
    "by error": ["--model.allocation=ByError", "--model.reconstruction=none"],
    "at random": ["--model.mask=Random", "--optimizer=torch.optim.SGD", "--optimizer.lr=0.01"],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_ends_with_the_weights_of_one_on_the_cpu(tmp_path, there, fit, form):
    for device, run in (("cpu", command), ("hpu", partial(there, partial(command, lazy=True)))):
        status, said = run(*fit(tmp_path / device, device, *FORMS[form]))
        assert status == 0, said
    assert same_weights(tmp_path / "cpu", tmp_path / "hpu")
    cpu, hpu = (json.loads((tmp_path / device / "metrics.json").read_text()) for device in ("cpu", "hpu"))
    assert cpu["perplexity"] == hpu["perplexity"]
    assert cpu["blocks"][-1]["error"] == pytest.approx(hpu["blocks"][-1]["error"])
    assert (cpu["peak_memory_bytes"]["device"], cpu["machine"]["accelerator"]) == (None, None)
    assert (hpu["peak_memory_bytes"]["device"], hpu["machine"]["accelerator"]) == (4321, "software hpu")
