"""What a run says that it will need, against what it is then measured to have taken."""

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from test_forms import IDS
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_prune.cli import main
from lit_prune.data import BATCH, CalibrationText, EvaluationText
from lit_prune.errors import BadInput
from lit_prune.masks import (
    ADMM,
    ALPS,
    GBLM,
    Gram,
    MutualInformation,
    RegionalGradient,
    SparseGPT,
    Sparsity,
    Wanda,
    solvers,
)
from lit_prune.method import Pruning
from lit_prune.models import (
    BlockCall,
    Home,
    Offloaded,
    Window,
    capture_calls,
    embed,
    find_blocks,
    find_neurons,
    halves,
    linear_layers,
)
from lit_prune.modules import (
    Reconstruction,
    join,
    kept_bytes,
    observe,
    prune_layers,
    prune_neurons,
    regional_gradients,
    window_memory,
)
from lit_prune.needs import Needs, _pruning_memory, estimate
from lit_prune.preflight import _check_memory

TEXT = Path(__file__).parent.parent / "tiny" / "text" / "calibration.txt"
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 512}
SENTENCE = r"This run needs about ([\d.]+) ([MG])B of memory, [\d.]+ [MG]B on disk, and [\d.]+ passes"
HEAVY = {"vocab_size": 258, "num_hidden_layers": 1, "hidden_size": 2048, "intermediate_size": 2816}
LIGHT = ["--data.samples=4", "--data.validation_samples=1", "--data.sequence_length=16", "--model.offload=true"]
MATRICES = [
    "--model.reconstruction=none",
    "--model.offload=true",
    "--evaluation.errors=false",
    "--data.validation_samples=0",
]
RUNS = {
    "all of a block": (HEAVY, LIGHT),
    "adapters": (HEAVY, [*LIGHT, "--model.trained=adapters", "--model.rank=256"]),
    "trained": (
        {"vocab_size": 258, "num_hidden_layers": 2},
        ["--data.samples=16", "--data.sequence_length=256", "--data.batch_size=16"],
    ),
    "perplexity of many words": (
        {"vocab_size": 40_000, "num_hidden_layers": 2},
        [
            "--model.reconstruction=none",
            f"--evaluation.texts=[{TEXT}]",
            "--evaluation.window_length=512",
            "--evaluation.batch_size=4",
        ],
    ),
    "many words in bfloat16, on disk": (
        {"vocab_size": 100_000, "num_hidden_layers": 2, "dtype": "bfloat16"},
        ["--model.reconstruction=none", "--model.offload=true"],
    ),
    "regional gradients": (
        {"vocab_size": 258, "num_hidden_layers": 2},
        [
            "--model.reconstruction=none",
            "--model.mask=RegionalGradient",
            "--data.samples=8",
            "--data.sequence_length=512",
        ],
    ),
    "true sequential": (
        {"vocab_size": 258, "num_hidden_layers": 1, "intermediate_size": 512},
        [*MATRICES, "--model.true_sequential=true", "--data.samples=128", "--data.sequence_length=512"],
    ),
    "ALPS, on disk": (
        {"vocab_size": 258, "num_hidden_layers": 1, "hidden_size": 1536, "intermediate_size": 1536},
        [*MATRICES, "--model.mask=ALPS", "--model.mask.iterations=3", "--model.mask.polish=1"],
    ),
    "many words and sequences, on disk": (
        {
            "vocab_size": 200_000,
            "num_hidden_layers": 1,
            "hidden_size": 256,
            "intermediate_size": 64,
            "dtype": "bfloat16",
        },
        [*MATRICES, "--data.samples=512", "--data.sequence_length=384"],
    ),
    "SparseGPT, on disk": (
        {"vocab_size": 258, "num_hidden_layers": 2, "hidden_size": 1024, "intermediate_size": 4096},
        ["--model.reconstruction=none", "--model.mask=SparseGPT", "--model.offload=true"],
    ),
}


@pytest.mark.parametrize(("shape", "settings"), RUNS.values(), ids=RUNS.keys())
def test_memory_is_foretold_within_a_fifth(ask, tmp_path, tiny_tokenizer, shape, settings):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**WIDE | IDS | shape))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    given = {"model.checkpoint": tmp_path / "model", "output_dir": tmp_path / "run", "data.source": TEXT}
    given |= {"data.samples": 8, "data.validation_samples": 4, "data.sequence_length": 64, "model.sparsity": 0.5}
    given |= {"evaluation.windows": 8, "evaluation.texts": "[]", "evaluation.references": "false"}
    given |= {"trainer.accelerator": "cpu", "trainer.max_epochs": 1}
    said = tmp_path / "said"
    ended = ask(["fit", *(f"--{key}={value}" for key, value in given.items()), *settings], said=str(said))
    assert ended["status"] == 0, said.read_text()
    peak = json.loads((tmp_path / "run" / "metrics.json").read_text())["peak_memory_bytes"]["host"] / 1e9
    number, unit = re.search(SENTENCE, said.read_text()).groups()
    assert float(number) / {"M": 1000, "G": 1}[unit] == pytest.approx(peak, rel=0.2)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are there at a time, but for some that have been there before."""

    def __init__(self, *before: torch.Tensor) -> None:
        super().__init__()
        self.before = {StorageWeakRef(tensor.untyped_storage()) for tensor in before}
        self.there: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            self.there[StorageWeakRef(storage)] = storage.nbytes()
        self.there = {ref: size for ref, size in self.there.items() if not ref.expired() and ref not in self.before}
        self.most = max(self.most, sum(self.there.values()))
        return result


METHODS = {
    "Wanda": (Wanda(), None, 2.4),
    "SparseGPT": (SparseGPT(), None, 1.8),
    "ADMM": (ADMM(), None, 1.3),
    "ADMM over the whole matrix": (ADMM(granularity="matrix", iterations=2, mask_iterations=1), None, 1.3),
    "ALPS": (ALPS(iterations=3, polish=1), None, 1.9),
    "Wanda, then ADMM": (Wanda(), solvers.ADMM(), 1.3),
    "SparseGPT, then ADMM": (SparseGPT(), solvers.ADMM(iterations=1), 1.3),
    "Wanda, then conjugate gradients": (Wanda(), solvers.ConjugateGradient(), 1.3),
}
"""And how many times as much as tensors take is said at most; libraries' own working memory is beside them."""


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
@pytest.mark.parametrize(
    ("method", "shape"),
    [*product(METHODS, [(384, 1024), (512, 512)]), ("SparseGPT", (128, 1024))],  # of the last, factors take most
)
def test_what_pruning_a_layer_needs_is_no_less_than_its_tensors_take(method, shape, sparsity):
    torch.manual_seed(0)
    mask, solver, most = METHODS[method]
    layer = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    block, entering = nn.Sequential(layer), torch.randn(1, 2 * shape[1], shape[1])
    pruning, call = Pruning("", Sparsity(sparsity), mask=mask, solver=solver), lambda block, hidden: block(hidden)
    said = _pruning_memory(pruning, Home(block, nn.ModuleList([block])), call, entering)
    with observe({"0": layer}, mask, solver) as statistics:
        layer(entering)
    join(statistics)
    inputs = statistics["0"].inputs
    gram = inputs.matrix if isinstance(inputs, Gram) else torch.empty(0)
    with Live(layer.weight, gram) as live:
        prune_layers({"0": layer}, statistics, mask, Sparsity(sparsity), solver)
    taken = gram.nbytes + live.most
    assert taken <= said <= most * taken


def block_of(length: int = 48, **shape: int) -> tuple[Home, BlockCall, torch.Tensor]:
    """A model of one block, its call, and a sequence of so many tokens that enters it."""
    torch.manual_seed(0)
    shape |= {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape)).requires_grad_(False)
    blocks, tokens = find_blocks(model), torch.randint(50, (1, length))
    (call,), entering = capture_calls(model, blocks, tokens), embed(model, blocks, tokens)
    return Home(model, blocks), call, entering


@pytest.mark.parametrize(("estimator", "width"), [("gaussian", 256), ("renyi", 768)])
@pytest.mark.parametrize("solver", [None, solvers.ADMM()], ids=["alone", "ADMM"])
def test_what_pruning_neurons_needs_is_no_less_than_its_tensors_take(solver, estimator, width):
    """Of layers that are all alike, only the one that reads the neurons has a Gram matrix."""
    home, call, entering = block_of(hidden_size=width, intermediate_size=width)
    mask, layers = MutualInformation(estimator=estimator), linear_layers(home.blocks[0])
    neurons = find_neurons(home.blocks[0], width)
    said = _pruning_memory(Pruning("", Sparsity(0.5), mask=mask, solver=solver), home, call, entering)
    with Live(*(layer.weight for layer in layers.values()), entering) as live:
        with observe({neurons.reader: layers[neurons.reader]}, mask, solver) as statistics:
            call(home.blocks[0], entering)
        join(statistics)
        live.most = 0
        prune_neurons(layers, neurons, statistics, mask, Sparsity(0.5), solver)
    assert live.most <= said <= 1.6 * live.most


def test_what_gradients_need_is_no_less_than_their_tensors_take():
    home, call, entering = block_of(8, hidden_size=128, intermediate_size=512)  # sums for weights are most
    mask, layers, hidden = RegionalGradient(), linear_layers(home.blocks[0]), entering.repeat(BATCH, 1, 1)
    part = Window([home.blocks[0]], [call])
    said = _pruning_memory(Pruning("", Sparsity(0.5), mask=mask), home, call, entering)
    said += BATCH * kept_bytes(part, entering)
    with Live(*(layer.weight for layer in layers.values()), hidden) as live:
        with observe(layers, mask) as statistics:
            part(hidden)
        join(statistics)
        live.most = 0
        gradients = regional_gradients(part, layers, hidden)
        known = {name: one._replace(gradient=gradients[name]) for name, one in statistics.items()}
        prune_layers(layers, known, mask, Sparsity(0.5))
    assert live.most <= said <= 1.5 * live.most


@pytest.mark.parametrize("trained", ["all", "pruned", "pruned_norms_biases", "adapters"])
@pytest.mark.parametrize("half", [None, 0, 1], ids=["whole", "attention", "mlp"])
def test_what_a_training_needs_is_no_less_than_its_tensors_take(trained, half):
    # of halves, the one that is trained takes more than the other
    home, call, entering = block_of(hidden_size=128, intermediate_size=64 if half == 0 else 512)
    home.blocks.requires_grad_()
    parts = [Window([home.blocks[0]], [call])] if half is None else halves(home.blocks[0], call, entering)
    part = parts[half or 0]
    masks = {layer: torch.rand_like(layer.weight) < 0.5 for layer in linear_layers(part).values()}
    inputs, targets = (part.enter(entering).detach().repeat(4, 1, 1).clone() for _ in range(2))
    said = window_memory(home.blocks, parts, entering, len(inputs), 1, False, trained, 64).step
    with Live(*part.parameters(), *masks.values(), inputs, targets) as live:
        module = Reconstruction(part, masks, trained=trained, rank=64)
        module.setup("fit")
        optimizer = module.optimizer(p for p in module.parameters() if p.requires_grad)
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(module(inputs), targets).backward()
            module.on_before_optimizer_step(optimizer)
            optimizer.step()
    # of adapters' weights what was small and is freed leaves holes, which count
    assert live.most <= said <= (2 if trained == "adapters" else 1.5) * live.most


@pytest.fixture
def needs(monkeypatch) -> Callable[..., Needs]:
    """A function that tells what a run needs: on which device, `estimate`'s last arguments, and other settings."""
    torch.manual_seed(0)
    shape = {"vocab_size": 500, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape, num_attention_heads=4))
    blocks, tokens = find_blocks(model), torch.zeros(1, 32, dtype=torch.long)
    (call, *_), entering = capture_calls(model, blocks, tokens), embed(model, blocks, tokens)
    monkeypatch.setattr("lit_prune.needs.available_memory", lambda _: 1_000_000)

    def needs(device: str, sequences: int = 16, processes: int = 1, offload: bool = False, **settings: Any) -> Needs:
        own = {key: settings.pop(key) for key in ("batch_size", "device_share", "memory_share") if key in settings}
        data, evaluation = CalibrationText(**own), EvaluationText()
        data.calibration, data.held_out = tokens.expand(sequences, -1), tokens[:0]
        if windows := settings.pop("windows", 0):
            evaluation = EvaluationText(["text"], window_length=32, batch_size=windows)
            evaluation._windows["text"] = tokens.expand(windows, -1)
        pruning = Pruning("", Sparsity(0.5), **settings)
        home = Offloaded(model, blocks, dict, dict, dict) if offload else Home(model, blocks)
        what, there = (pruning, data, evaluation, home, call, entering), torch.device(device)
        found = estimate(*what, torch.float32, 0, there, sequences, processes)
        _check_memory(*what, there, sequences, found, processes)
        return found

    return needs


def test_a_device_holds_the_activations_of_a_pass_over_four_sequences(needs):
    """Whatever the size of a training's batches, which may be less."""
    alone, four, more = (needs("cuda", count, reconstruction="none").device for count in (1, 4, 64))
    kept = (four - alone) / 3
    assert kept > 32 * 4 * (2 * 64 + 4 * 32), "of an MLP and of attention"
    assert more == four
    assert needs("cuda", batch_size=1).device > 4 * kept
    assert needs("cuda", 1, reconstruction="none", windows=4).device > needs("cuda", 1, reconstruction="none").device


def test_true_sequential_holds_what_all_sequences_go_on_with(needs):
    settings = {"reconstruction": "none", "true_sequential": True}
    waits = 32 * 4 * 5 * 32  # before attention's last product: queries, keys, values, their outcome, and their input
    few, many = (needs("cuda", count, **settings).device for count in (16, 64))
    assert many - few == 48 * (waits + 32 * 4 * 32), "and a copy of what has entered"
    few, many = (needs("cpu", count, memory_share=10, **settings).more for count in (16, 64))
    assert many - few == 48 * (waits + 2 * 32 * 4 * 32), "and both streams, one of which is led on in place"


def test_gradients_of_blocks_hold_the_activations_of_a_training_batch(needs):
    one, four, eight, sixteen = (
        needs("cuda", 64, mask=GBLM(backward="blocks"), reconstruction="none", batch_size=size).device
        for size in (1, 4, 8, 16)
    )
    assert one == four, "the passes beside them take four"
    kept = (eight - four) / 4
    assert kept > 32 * 4 * (2 * 64 + 4 * 32)
    assert sixteen == eight + 8 * kept


@pytest.mark.parametrize(("passes", "said"), [(3, "3"), (6.5, "6.5"), (5 + 2 / 3, "5.7"), (100, "100")])
def test_passes_are_said_in_plain_numbers(passes, said):
    needs = Needs(memory=1, more=1, device=None, disk=1, passes=passes, streams="memory")
    assert f"and {said} passes through each block" in str(needs)


def test_a_device_holds_embeddings_head_and_logits(needs):
    outside, logits, hidden = 4 * (2 * 500 + 1) * 32, 4 * 32 * 500, 4 * 32 * 32
    few, many = (needs("hpu", windows=windows, offload=True) for windows in (256, 512))
    assert (few.device, many.device) == (outside + 2 * 256 * logits, outside + 2 * 512 * logits)
    assert many.memory - few.memory == 256 * hidden, "logits are on the device alone"


def test_a_training_on_a_device_needs_nothing_of_the_host_but_the_best_weights(needs, monkeypatch):
    for device, same in (("hpu", True), ("cpu", False)):
        sizes = {needs(device, batch_size=size, offload=True).memory for size in (1, 64)}
        assert (len(sizes) == 1) is same
    assert needs("hpu", batch_size=64).device > needs("hpu", batch_size=1).device
    monkeypatch.setattr("lit_prune.preflight.available_memory", lambda _: 0)
    needs("hpu")
    with pytest.raises(BadInput, match=r"model\.reconstruction: block needs"):
        needs("cpu")


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        ({}, ["model.trained adapters", "model.reconstruction sublayer", "model.reconstruction layer"]),
        ({"trained": "adapters"}, ["model.reconstruction sublayer", "model.reconstruction layer"]),
        ({"reconstruction": "sublayer"}, ["model.trained adapters", "model.reconstruction layer"]),
        ({"reconstruction": "layer"}, ["model.trained adapters"]),
    ],
)
def test_a_refusal_names_what_needs_less(needs, monkeypatch, settings, ways):
    monkeypatch.setattr("lit_prune.preflight.available_memory", lambda _: 0)
    monkeypatch.setattr("lit_prune.needs.available_memory", lambda _: 0)  # hidden states lie on disk
    with pytest.raises(BadInput, match=r"give .*fewer data\.samples, or a lower data\.batch_size\.$") as refused:
        needs("cpu", batch_size=1, rank=1, **settings)
    assert re.findall(r"(model\.\w+ \w+) \([\d.]+ GB\)", str(refused.value)) == ways


def test_processes_share_what_hidden_states_may_take(needs):
    stream = 16 * 32 * 32 * 4
    share = 3.5 * stream / 1_000_000  # three at a time
    assert needs("cpu", memory_share=share).streams == "memory"
    assert needs("cpu", processes=2, memory_share=share).streams == "disk"


def test_pinned_hidden_states_count_twice(needs):
    stream = 256 * 32 * 32 * 4
    settings = {"sequences": 256, "memory_share": 10, "device_share": 0, "offload": True, "reconstruction": "none"}
    assert needs("cuda", **settings).more - needs("hpu", **settings).more == 2 * stream


def test_a_dry_run_only_says_what_is_needed(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "configs/tiny.yaml", "--output_dir", str(tmp_path / "run"), "--dry_run"])
    assert stop.value.code == 0
    assert re.search(SENTENCE, capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
