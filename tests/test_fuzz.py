"""Thousands of damaged files and odd settings: each works, or gets one sentence; nothing is written elsewhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint import write_gguf
from test_forms import COMMON

from lit_prune.cli import main
from lit_prune.data.generated_text import whole_texts
from lit_prune.errors import BadInput
from lit_prune.models import load_config, load_model, load_offloaded, load_tokenizer, resolve
from lit_prune.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("without_plots")

CPU = torch.device("cpu")
FIXTURES = [HealthCheck.function_scoped_fixture]
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=12)),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, float, int | bytes]], reach: int) -> bytes:
    """A file with some of its first bytes changed, cut off or pushed back."""
    changed = bytearray(content)
    for kind, where, what in edits:
        at = int(where * (min(len(changed), reach) - 1)) if changed else 0
        if kind == "flip" and changed:
            changed[at] ^= what
        elif kind == "cut":
            del changed[at:]
        elif kind == "insert":
            changed[at:at] = what
    return bytes(changed)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tiny_tokenizer) -> dict[str, Path]:
    """A checkpoint in one file, and one in several."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**COMMON, num_hidden_layers=1))
    folders = {"one": "1GB", "many": "20KB"}
    for name, size in folders.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name], max_shard_size=size)
        tiny_tokenizer.save_pretrained(folders[name])
    return folders


def works_or_says_so(load: Callable[[], object]) -> None:
    try:
        load()
    except BadInput as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert str(error).strip()  # noqa: PT017


def read_all(checkpoint: str) -> None:
    """All that a run on disk reads of a checkpoint."""
    home = load_offloaded(checkpoint)
    with home.outside(CPU), home.on(0, CPU):
        pass


READ: dict[str, tuple[str, str, Callable[[str], object]]] = {
    "weights left on disk": ("one", "model.safetensors", read_all),
    "weights in memory": ("one", "model.safetensors", load_model),
    "table of shards": ("many", "model.safetensors.index.json", read_all),
    "configuration": ("one", "config.json", load_config),
    "configuration of weights left on disk": ("one", "config.json", read_all),
    "generation settings of weights left on disk": ("one", "generation_config.json", read_all),
    "tokenizer": ("one", "tokenizer.json", load_tokenizer),
}


@pytest.mark.parametrize(("kind", "file", "read"), READ.values(), ids=READ.keys())
@given(edits=EDITS)
@settings(max_examples=120, suppress_health_check=FIXTURES)
def test_damaged_checkpoint(tmp_path, sound, kind, file, read, edits):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound[kind], folder)
    (folder / file).write_bytes(edited((sound[kind] / file).read_bytes(), edits, 3000))
    works_or_says_so(lambda: read(str(folder)))


@given(edits=EDITS)
@settings(max_examples=60, suppress_health_check=FIXTURES, deadline=None)
def test_damaged_gguf(tmp_path, monkeypatch, edits):
    """Its header, in which everything is said but the weights."""
    monkeypatch.setenv("LIT_PRUNE_CACHE", str(tmp_path / "cache"))
    sound, damaged = tmp_path / "sound.gguf", tmp_path / "damaged.gguf"
    if not sound.exists():
        write_gguf(sound)
    damaged.write_bytes(edited(sound.read_bytes(), edits, 4000))
    works_or_says_so(lambda: resolve(str(damaged)))


@given(edits=EDITS, file=st.sampled_from(["manifest.json", "metrics.json", "config.yaml"]))
@settings(max_examples=400, suppress_health_check=FIXTURES)
def test_damaged_run_folder(tmp_path, edits, file):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    folder = RunFolder(run, "seed_everything: 0\n")
    folder.begin()
    folder.metrics = {"blocks": [{"index": 0}], "trainings": [], "seconds": {"total": 1.5}}
    folder.save_metrics()
    folder.save_round(0, {0: {"weight": torch.ones(2)}}, {})
    (run / file).write_bytes(edited((run / file).read_bytes(), edits, 3000))
    works_or_says_so(lambda: RunFolder(run, "seed_everything: 0\n"))


@given(edits=EDITS)
@settings(max_examples=400, suppress_health_check=FIXTURES)
def test_damaged_generated_text(tmp_path, edits):
    line = {"index": 0, "generated": {"model": "m", "seed": 0}, "tokens": [1, 2, 3], "text": "abc"}
    file = tmp_path / "own.jsonl"
    file.write_bytes(edited((json.dumps(line) + "\n").encode(), edits, 3000))
    works_or_says_so(lambda: list(whole_texts(file, "data.self_generated")))


KEYS = [
    "model.sparsity", "model.mask", "model.solver", "model.skip", "model.allocation", "model.reconstruction",
    "model.window", "model.loss", "model.rank", "model.offload", "data.source", "data.samples", "data.batch_size",
    "data.memory_share", "data.self_generated", "evaluation.texts", "evaluation.windows", "optimizer", "optimizer.lr",
    "lr_scheduler", "trainer.max_epochs", "trainer.precision", "trainer.devices", "seed_everything",
]  # fmt: skip
ODD = st.one_of(
    st.integers(-3, 10**6).map(str),
    st.floats(allow_nan=True).map(str),
    st.sampled_from(["null", "true", "[]", "{}", "2:4", "4:2", "../..", "Wanda", "torch.nn.Linear", "os.system", "''"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12),
)


@given(chosen=st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=3))
@settings(max_examples=25, suppress_health_check=FIXTURES)
def test_odd_settings(tmp_path, capsys, monkeypatch, chosen):
    """With a checkpoint that does not exist, nothing can work; what is said is one sentence, whatever is wrong."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # or two devices would begin, with the command that runs the tests
    given_ = {"model.checkpoint": tmp_path / "none", "output_dir": tmp_path / "run", "model.sparsity": 0.5} | chosen
    with pytest.raises(SystemExit) as stop:
        main(["fit", *(f"--{key}={value}" for key, value in given_.items())])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.splitlines()[-1].startswith("lit-prune: ")
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
