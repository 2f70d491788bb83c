"""Models left on disk: the same weights and figures as in memory, and never more than a window of blocks at a time."""

import gc
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import files_up_to
from safetensors.torch import load_file, save_file
from test_forms import COMMON, GPT2, OPT, WIDE, command
from torch import nn

from lit_prune import preflight
from lit_prune import run as run_module
from lit_prune.data import Space
from lit_prune.errors import BadInput
from lit_prune.heap import give_back
from lit_prune.models import Home, Offloaded, find_blocks, load_model, load_offloaded, shards
from lit_prune.needs import process_memory
from lit_prune.rounds import Round
from lit_prune.walk import Walk

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON, num_hidden_layers=3, tie_word_embeddings=False),
    "tied llama": lambda: tf.LlamaConfig(**COMMON, num_hidden_layers=3, tie_word_embeddings=True),
    "gpt2": lambda: tf.GPT2Config(**GPT2, n_layer=3),
    "opt": lambda: tf.OPTConfig(**WIDE, **OPT, num_hidden_layers=3, do_layer_norm_before=True),
    "gemma2": lambda: tf.Gemma2Config(**COMMON, num_hidden_layers=3, head_dim=8, sliding_window=6),
    "qwen2": lambda: tf.Qwen2Config(**COMMON, num_hidden_layers=3),
}
DEEPER = {"deeper llama": lambda: tf.LlamaConfig(**COMMON, num_hidden_layers=5)}
CROSS = ["--model.reconstruction=cross_block", "--model.global_propagation=false"]
FITS = {
    "Wanda": [],
    "SparseGPT 2:4": ["--model.mask=SparseGPT", "--model.sparsity=2:4"],
    "cross_block": CROSS,
    "cross_block, 3 by 1": [*CROSS, "--model.window=3"],
    "cross_block, 3 by 2": [*CROSS, "--model.window=3", "--model.stride=2"],
    "cross_block towards the dense stream": CROSS[:1],
    "sublayer": ["--model.reconstruction=sublayer"],
    "independent": ["--model.independent=true"],
    "GBLM": ["--model.mask=GBLM", "--model.mask.backward=blocks", "--model.reconstruction=none"],
    "OWL": ["--model.allocation=OWL", "--model.reconstruction=none"],
    "sliced": ["--model.mask=MutualInformation", "--model.mask.slice=true", "--model.sparsity=0.25"],
}
WIDTHS = {name: 3 if "3" in name else 2 for name in FITS if name.startswith("cross_block")}
COPIED = {"cross_block", "cross_block, 3 by 1", "cross_block, 3 by 2", "sublayer"}
"""Their targets are made by dense copies, later than a block is pruned."""


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """Which takes half of a short run's time, and is tested elsewhere."""
    monkeypatch.setattr(run_module.Run, "_report", lambda _: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("In the beginning was the word, and the word was tiny, and it was so. " * 20)
    return file


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_tokenizer) -> Callable[..., Path]:
    """A function that saves a random model: its name, its dtype, and whether in many files."""
    made: dict[tuple[object, ...], Path] = {}

    def save(name: str = "llama", dtype: torch.dtype = torch.float16, sharded: bool = True) -> Path:
        key = (name, dtype, sharded)
        if key not in made:
            torch.manual_seed(0)
            folder = made[key] = tmp_path_factory.mktemp("model")
            model = tf.AutoModelForCausalLM.from_config((CONFIGS | DEEPER)[name]()).to(dtype)
            model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
            tiny_tokenizer.save_pretrained(folder)
            assert len(list(folder.glob("*.safetensors"))) > 2 or not sharded
        return made[key]

    return save


def fit(capsys, folder: Path, checkpoint: Path, text: Path, *settings: str) -> dict[str, object]:
    short = ["--trainer.max_epochs=1", "--optimizer.lr=0.01", f"--evaluation.texts=[{text}]", "--evaluation.windows=3"]
    short += ["--evaluation.window_length=16"]
    status, said = command(capsys, folder, checkpoint, text, *short, *settings)
    assert status == 0, said
    return json.loads((folder / "metrics.json").read_text())


def assert_same(one: Path, other: Path) -> None:
    """Both runs' models as transformers loads them, bit for bit."""
    a, b = (tf.AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto") for run in (one, other))
    assert a.dtype == b.dtype
    assert a.config.to_dict() == b.config.to_dict() | {"_name_or_path": a.config._name_or_path}
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("dtype", "stays"), [(torch.float32, True), (torch.bfloat16, False)])
def test_what_lies_outside_the_blocks_stays_in_a_file_of_float32(tmp_path, dtype, stays):
    few = COMMON | {"vocab_size": 250_000, "hidden_size": 32}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**few, num_hidden_layers=1)).to(dtype)
    model.save_pretrained(tmp_path)
    del model
    home = load_offloaded(str(tmp_path))
    give_back()  # what is read would otherwise lie in memory that was let go before
    before = process_memory()
    outside = home.read_outside()
    assert sum(tensor.nbytes for tensor in outside.values()) > 63e6
    assert (process_memory() - before < 16e6) is stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_outside_the_blocks_is_written_a_few_rows_at_a_time(tmp_path, dtype):
    few = COMMON | {"vocab_size": 250_000, "hidden_size": 32}
    tf.LlamaForCausalLM(tf.LlamaConfig(**few, num_hidden_layers=1)).to(dtype).save_pretrained(tmp_path)
    home = load_offloaded(str(tmp_path))
    expected = {name: tensor.half() for name, tensor in home.read_outside().items()}
    give_back()
    before = most = process_memory()
    for name, tensor in home.outside_in_parts(torch.float16).items():
        rows = 0
        for part in tensor.parts:
            assert torch.equal(part, expected[name][rows : rows + len(part)])
            rows += len(part)
            most = max(most, process_memory())
        assert (rows, *tensor.shape[1:]) == expected[name].shape
    assert most - before < 16e6


def test_what_lies_outside_the_blocks_of_a_model_in_memory_is_copied_as_it_is_stored():
    """Whole numbers stay what they are."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON, num_hidden_layers=1))
    model.model.register_buffer("seen", torch.arange(3))
    home = Home(model, find_blocks(model))
    read = home.read_outside()
    for dtype in (torch.float32, torch.bfloat16):
        outside = home.outside_in_parts(dtype)
        assert outside.keys() == read.keys() >= {"model.seen", "model.embed_tokens.weight", "model.norm.weight"}
        for name, tensor in outside.items():
            (part,) = tensor.parts
            assert tensor.dtype == part.dtype == (torch.int64 if name == "model.seen" else dtype)
            assert torch.equal(part, read[name].to(part.dtype))
            assert part.data_ptr() != read[name].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_that_transformers_loads(saved, name, sharded, dtype):
    checkpoint = saved(name, dtype, sharded)
    whole, home = load_model(str(checkpoint)), load_offloaded(str(checkpoint))
    assert all(parameter.is_meta for parameter in home.model.parameters())
    tokens = torch.arange(12).view(1, 12)
    with home.outside(torch.device("cpu")):
        for index in range(3):
            home.load(index)
        for expected, loaded in zip(whole.state_dict().items(), home.model.state_dict().items(), strict=True):
            assert expected[0] == loaded[0]
            assert torch.equal(expected[1], loaded[1])
            assert loaded[1].dtype == torch.float32
        assert torch.equal(whole(input_ids=tokens).logits, home.model(input_ids=tokens).logits)
        for index in range(3):
            home.release(index)
    assert all(parameter.is_meta for parameter in home.model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_left_on_disk_ends_as_one_in_memory(tmp_path, capsys, saved, text, name):
    figures = [
        fit(capsys, tmp_path / offload, saved(name), text, f"--model.offload={offload}")
        for offload in ("false", "true")
    ]
    assert_same(tmp_path / "false", tmp_path / "true")
    for training in [*figures[0]["trainings"], *figures[1]["trainings"]]:
        del training["seconds"]
    for key in ("error", "sparsity", "parameters", "trainings"):
        assert figures[0][key] == figures[1][key]
    for stage in ("dense", "masked", "pruned"):
        assert figures[0]["perplexity"][stage] == pytest.approx(figures[1]["perplexity"][stage], rel=1e-6)


@pytest.mark.parametrize("name", FITS)
def test_never_more_than_a_window_and_its_dense_copy_is_in_memory(tmp_path, capsys, monkeypatch, saved, text, name):
    load, train, most, rounds_seen = Offloaded.load, Walk.train, [0], []
    width, checkpoint = WIDTHS.get(name, 1), saved("deeper llama" if "3" in name else "llama")

    def in_memory(home: Offloaded) -> set[int]:
        return {i for i, block in enumerate(home.blocks) if not any(p.is_meta for p in block.parameters())}

    def counted(home: Offloaded, index: int) -> None:
        load(home, index)
        most[0] = max(most[0], len(in_memory(home)))

    def looked_at(walk: Walk, rounds: Sequence[Round]) -> None:
        (round_,) = rounds
        assert in_memory(walk.home) == {*round_.window}
        assert walk._dense_blocks.keys() == ({*round_.window} if name in COPIED else set())
        rounds_seen.append(round_.index)
        train(walk, rounds)

    with monkeypatch.context() as patch:
        patch.setattr(Offloaded, "load", counted)
        patch.setattr(Walk, "train", looked_at)
        fit(capsys, tmp_path / "true", checkpoint, text, "--model.offload=true", *FITS[name])
    assert len(rounds_seen) >= 3
    assert most[0] == width
    fit(capsys, tmp_path / "false", checkpoint, text, "--model.offload=false", *FITS[name])
    assert_same(tmp_path / "false", tmp_path / "true")


def test_a_model_that_does_not_fit_is_left_on_disk_with_a_line_that_says_so(
    tmp_path, capsys, caplog, monkeypatch, saved, text
):
    monkeypatch.setattr(preflight, "parameters", lambda _: 10**15)
    fit(capsys, tmp_path / "run", saved(), text, "--model.reconstruction=none")
    assert "its weights stay on disk" in caplog.text


@pytest.mark.parametrize("offload", ["true", "false"])
def test_a_result_is_in_shards_that_are_not_too_large(tmp_path, capsys, monkeypatch, saved, text, offload):
    settings = ["--model.reconstruction=none", "--evaluation.texts=[]", f"--model.offload={offload}"]
    fit(capsys, tmp_path / "whole", saved(), text, *settings)
    monkeypatch.setattr(shards, "SHARD", 20_000)
    fit(capsys, tmp_path / "parts", saved(), text, *settings)
    parts = [load_file(file) for file in (tmp_path / "parts" / "model").glob("*.safetensors")]
    assert len(parts) > 3
    assert all(len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 20_000 for part in parts)
    whole = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert whole.keys() == set().union(*parts)
    assert all(torch.equal(whole[name], tensor) for part in parts for name, tensor in part.items())
    one, other = (tf.AutoModelForCausalLM.from_pretrained(tmp_path / run / "model") for run in ("whole", "parts"))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_an_interrupted_run_on_disk_goes_on(tmp_path, capsys, monkeypatch, saved, text):
    settings = ["--model.offload=true", "--model.reconstruction=cross_block"]
    fit(capsys, tmp_path / "whole", saved(), text, *settings)
    commit, rounds = run_module.Run._commit, []

    class Killed(Exception):
        pass

    def killed(*arguments: object) -> None:
        commit(*arguments)
        rounds.append(arguments[1])
        if len(rounds) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "_commit", killed)
        with pytest.raises(Killed):
            fit(capsys, tmp_path / "run", saved(), text, *settings)
    fit(capsys, tmp_path / "run", saved(), text, *settings)
    assert_same(tmp_path / "whole", tmp_path / "run")


def damaged(saved: Path, folder: Path, what: str) -> Path:
    """A copy of a checkpoint with something wrong."""
    shutil.copytree(saved, folder)
    index = folder / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / contents["weight_map"][name]
    match what:
        case "missing shard":
            shard.unlink()
        case "truncated shard":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "garbage":
            shard.write_bytes(b"\xff" * 200)
        case "weight not there":
            save_file({n: t for n, t in load_file(shard).items() if n != name} | {"x": torch.ones(1)}, shard)
        case "weight not listed":
            del contents["weight_map"][name]
            index.write_text(json.dumps(contents))
        case "other shape":
            save_file(load_file(shard) | {name: torch.ones(3, 3)}, shard)
        case "not a number":
            tensors = load_file(shard)
            tensors[name][1, 2] = float("nan")
            save_file(tensors, shard)
        case "outside":
            contents["weight_map"][name] = "../" + shard.name
            index.write_text(json.dumps(contents))
        case "no generation settings":
            (folder / "generation_config.json").write_text("{")
        case "unknown activation":
            changed = json.loads((folder / "config.json").read_text()) | {"hidden_act": "none such"}
            (folder / "config.json").write_text(json.dumps(changed))
        case "no table":
            index.write_text("{")
    return folder


DAMAGES = {
    "missing shard": "the shard '",
    "truncated shard": "the shard '",
    "garbage": "the shard '",
    "weight not there": "lacks the weight 'model.layers.1.mlp.up_proj.weight'; fetch it again.",
    "weight not listed": "holds no 'model.layers.1.mlp.up_proj.weight' of shape (48, 32)",
    "other shape": "holds no 'model.layers.1.mlp.up_proj.weight' of shape (48, 32)",
    "not a number": "'model.layers.1.mlp.up_proj.weight' holds NaN or infinite values, or some beyond float32's; give",
    "outside": "which is not beside it.",
    "no generation settings": "could be loaded (",
    "unknown activation": "could be loaded (there is no 'none such'",
    "no table": "nor a sound model.safetensors.index.json.",
}


@pytest.mark.parametrize(("what", "expected"), DAMAGES.items(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_gets_one_sentence(tmp_path, capsys, saved, text, what, expected):
    checkpoint = damaged(saved(), tmp_path / "model", what)
    status, said = command(capsys, tmp_path / "run", checkpoint, text, "--model.offload=true")
    assert status == 2
    assert said.splitlines()[-1].startswith("lit-prune: model.")
    assert expected in said
    assert "Traceback" not in said
    # what only a look at all weights can show comes to light when it is read, with finished blocks in place
    assert (tmp_path / "run" / "blocks").exists() == (what == "not a number")


@pytest.mark.parametrize("stored", ["first", "second", "both", "both, unequal"])
def test_of_tied_weights_either_may_be_stored_but_not_two_different_ones(tmp_path, saved, stored):
    folder, file = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    shutil.copytree(saved(), folder)
    weights = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for shard in folder.glob("model*"):
        shard.unlink()
    changed = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(changed))
    first, second = "model.embed_tokens.weight", "lm_head.weight"
    weights[second] = weights[first].clone() + (stored == "both, unequal")
    save_file({n: t for n, t in weights.items() if n != {"first": second, "second": first}.get(stored)}, file)
    if stored == "both, unequal":
        with pytest.raises(BadInput, match=f"ties '{first}' and '{second}' by its config.json, but holds different"):
            load_offloaded(str(folder))
        return
    home = load_offloaded(str(folder))
    with home.outside(torch.device("cpu")):
        assert torch.equal(home.model.lm_head.weight, weights[first].float())
        assert home.model.lm_head.weight is home.model.model.embed_tokens.weight


def test_gblm_of_the_whole_model_is_refused(tmp_path, capsys, saved, text):
    settings = ["--model.mask=GBLM", "--model.mask.backward=model", "--model.offload=true"]
    status, said = command(capsys, tmp_path / "run", saved(), text, *settings)
    assert status == 2
    assert "give backward 'blocks'" in said


@pytest.mark.parametrize("form", ["block", "cross_block", "sublayer"])
def test_streams_on_disk_change_nothing(tmp_path, capsys, caplog, saved, text, form):
    for share, place in (("0", "disk"), ("1", "memory")):
        settings = [f"--data.memory_share={share}", f"--model.reconstruction={form}"]
        assert fit(capsys, tmp_path / share, saved(), text, *settings)["hidden_states"] == place
    assert caplog.text.count("they lie on disk") == 1
    assert_same(tmp_path / "0", tmp_path / "1")
    assert not (tmp_path / "0" / "hidden").exists()


def test_space_on_disk_keeps_what_it_is_given_without_a_name(tmp_path):
    space = Space(tmp_path / "hidden")
    one, other = space.empty((3, 5, 7), torch.float32), space.empty((2, 4), torch.bfloat16)
    expected = torch.randn(3, 5, 7)
    one.copy_(expected)
    other.fill_(3)
    space.let_go()
    assert torch.equal(one, expected)
    assert (other == 3).all()
    part = one[1:]
    del one
    gc.collect()
    space.let_go()
    assert torch.equal(part, expected[1:])
    assert not list((tmp_path / "hidden").iterdir())


def test_space_on_a_full_disk(tmp_path):
    with files_up_to(1000), pytest.raises(BadInput, match=r"^output_dir: .* has no room for"):
        Space(tmp_path).empty((1000,), torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_block_that_is_left_leaves_no_memory_behind():
    """Its small tensors lie where freed memory stays with the process, below something that is needed still."""
    block = nn.ModuleList(nn.Linear(150, 150) for _ in range(600))
    weights = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    home = Offloaded(
        block, nn.ModuleList([block]), lambda _: {n: torch.ones(s) for n, s in weights.items()}, dict, dict
    )
    home.release(0)
    before, kept = process_memory(), []
    for _ in range(3):
        home.load(0)
        assert process_memory() > before + 40e6
        kept.append(torch.ones(150))
        home.release(0)
        assert process_memory() < before + 10e6
