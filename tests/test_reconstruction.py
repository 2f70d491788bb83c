"""Training of blocks against closed forms and brute force."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from transformers import Adafactor, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from lit_prune.data import ReconstructionPairs, propagate
from lit_prune.data.streams import Rows
from lit_prune.masks import InputNorm, LayerStatistics, Sparsity, Wanda
from lit_prune.models import BlockCall, Window, capture_calls, embed, find_blocks, linear_layers, weight_of
from lit_prune.modules import (
    Crossing,
    GlobalPropagation,
    IndependentPropagation,
    KeepBest,
    LossHistory,
    Reconstruction,
)
from lit_prune.modules.reconstruction import mean_squared_error

NOTHING = BlockCall((), {})

OPTIMIZERS = {
    "AdamW with weight decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.01),
    "Adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
}


class LinearBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


def trainer(epochs: int, *callbacks: L.Callback, **arguments: object) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=-1,
        callbacks=list(callbacks),
        **arguments,
    )


def unit(block, call, masks=None, *arguments, kind=Reconstruction, **more):
    """The reconstruction of one whole block, with masks by name."""
    layers = linear_layers(block)
    return kind(
        Window([block], [call]), {layers[name]: mask for name, mask in (masks or {}).items()}, *arguments, **more
    )


def crossing(sparse, dense, on_sparse, on_dense):
    return Crossing(lambda: sparse, lambda: dense, lambda _: on_sparse, lambda _: on_dense)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def random_masks(block: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Sparsity("0.5").select(torch.rand(weight_of(layer).shape, generator=generator))
        for name, layer in linear_layers(block).items()
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("accumulate", [1, 2])
def test_masked_weights_are_zero_after_every_step(optimizer, accumulate):
    class Watch(L.Callback):
        steps = 0

        def on_train_batch_end(self, trainer, module, *_):
            self.steps += 1
            for layer, mask in module.masks.items():
                assert torch.all(weight_of(layer)[~mask] == 0)

    model = tiny_llama()
    blocks = find_blocks(model)
    tokens = torch.randint(64, (8, 16))
    (call, *_), hidden = capture_calls(model, blocks, tokens), embed(model, blocks, tokens)
    target = propagate(lambda h: call(blocks[0], h), hidden)
    masks = random_masks(blocks[0])
    before = {name: weight_of(layer).clone() for name, layer in linear_layers(blocks[0]).items()}
    module = unit(blocks[0], call, masks, optimizer)
    watch = Watch()
    fit = trainer(3, watch, accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
    fit.fit(module, DataLoader(TensorDataset(hidden, target), batch_size=2))
    assert watch.steps == 12
    for name, layer in linear_layers(blocks[0]).items():
        assert not torch.equal(weight_of(layer), before[name] * masks[name]), f"{name} was not trained"
        assert (weight_of(layer) == 0).sum() == (~masks[name]).sum()


def test_zero_sparsity_leaves_the_block_bit_identical():
    model = tiny_llama()
    blocks = find_blocks(model)
    tokens = torch.randint(64, (4, 16))
    (call, *_), hidden = capture_calls(model, blocks, tokens), embed(model, blocks, tokens)
    before = copy.deepcopy(blocks[0].state_dict())
    target = propagate(lambda h: call(blocks[0], h), hidden)
    masks = {name: torch.ones_like(weight_of(m), dtype=torch.bool) for name, m in linear_layers(blocks[0]).items()}
    trainer(2).fit(unit(blocks[0], call, masks), datamodule=ReconstructionPairs(hidden, target, 4))
    assert all(torch.equal(before[name], tensor) for name, tensor in blocks[0].state_dict().items())


@pytest.mark.parametrize("kind", [Reconstruction, GlobalPropagation, IndependentPropagation])
def test_trained_optimum_of_a_linear_block_is_least_squares(kind):
    """On each row's support the optimum is that of lstsq, whichever streams input and target come from."""
    torch.manual_seed(1)
    width = 12
    block = LinearBlock(width).double()
    sparse = torch.randn(4, 64, width, dtype=torch.float64)
    dense = sparse + 0.1 * torch.randn_like(sparse)
    on_sparse, on_dense = block(sparse).detach(), block(dense).detach()
    masks = random_masks(block)
    module = unit(block, NOTHING, masks, lambda p: torch.optim.AdamW(p, lr=3e-2, weight_decay=0), "cosine", kind=kind)
    entering, target = module.pair(crossing(sparse, dense, on_sparse, on_dense))
    # the loss is computed in float32, whose rounding bounds how close the optimum can come
    trainer(400).fit(module, datamodule=ReconstructionPairs(entering, target, 4, batch_size=4))
    inputs, outputs = entering.flatten(0, 1), target.flatten(0, 1)
    for row, kept in enumerate(masks["linear"]):
        best = torch.linalg.lstsq(inputs[:, kept], outputs[:, [row]]).solution[:, 0]
        assert torch.allclose(block.linear.weight[row, kept], best, atol=2e-4)
        assert torch.all(block.linear.weight[row, ~kept] == 0)


def test_targets_are_those_of_whole_model_computations():
    """BR: the dense block on the sparse stream. GP: the dense block on the dense stream."""
    dense, sparse = tiny_llama(), tiny_llama()
    tokens = torch.randint(64, (3, 16))
    with torch.no_grad():  # the sparse model's first two blocks are pruned
        for block in find_blocks(sparse)[:2]:
            for name, mask in random_masks(block).items():
                weight_of(linear_layers(block)[name]).mul_(mask)
        states = {
            name: model.model(tokens, output_hidden_states=True).hidden_states
            for name, model in (("dense", dense), ("sparse", sparse))
        }
        # what leaves block 1 of a model is what enters its block 2
        mixed = copy.deepcopy(sparse)
        mixed.model.layers[1] = dense.model.layers[1]
        br = mixed.model(tokens, output_hidden_states=True).hidden_states[2]
        blocks = find_blocks(dense)
        call = capture_calls(dense, blocks, tokens)[1]
        part = Window([blocks[1]], [call])
        streams = [states["sparse"][1], states["dense"][1]]
        streams += [propagate(part, stream) for stream in streams]
    for kind, expected in (
        (Reconstruction, (states["sparse"][1], br)),
        (GlobalPropagation, (states["sparse"][1], states["dense"][2])),
        (IndependentPropagation, (states["dense"][1], states["dense"][2])),
    ):
        assert all(map(torch.equal, kind(part).pair(crossing(*streams)), expected))
    assert not torch.equal(br, states["dense"][2])


class Scripted(L.Callback):
    """Sets the weight to a given number at the end of each epoch's training, before validation."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_train_batch_end(self, trainer, module, *_):
        module.part.blocks[0].linear.weight.data.fill_(self.values[trainer.current_epoch])


@pytest.mark.parametrize(
    ("values", "best_epoch", "kept"),
    [([3.0, 1.5, 9.0], 2, 1.5), ([9.0, 8.0, 7.0], 0, 1.9), ([1.1, 1.2, 1.3], 1, 1.1), ([5.0, 4.0, 1.0], 3, 1.0)],
)
def test_best_held_out_epoch_is_kept_and_the_start_counts(values, best_epoch, kept):
    block = LinearBlock(1)
    block.linear.weight.data.fill_(1.9)
    inputs = torch.ones(4, 1, 1)
    pairs = ReconstructionPairs(inputs, inputs.clone(), 2, batch_size=2)  # the best weight is 1
    best, history = KeepBest(), LossHistory()
    module = unit(block, NOTHING, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer(3, Scripted(values), best, history).fit(module, datamodule=pairs)
    assert best.best_epoch == best_epoch
    assert block.linear.weight.item() == pytest.approx(kept)
    assert history.held_out == pytest.approx([(w - 1) ** 2 for w in (1.9, *values)], rel=1e-5)
    assert history.train[0] == pytest.approx(0.81, rel=1e-5)
    assert len(history.train) == 3


def test_without_held_out_samples_the_last_epoch_stays():
    block = LinearBlock(1)
    inputs = torch.ones(2, 1, 1)
    best, history = KeepBest(), LossHistory()
    module = unit(block, NOTHING, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    pairs = ReconstructionPairs(inputs, inputs, 2)
    trainer(2, Scripted([3.0, 5.0]), best, history).fit(module, datamodule=pairs)
    assert (best.best_epoch, history.held_out, block.linear.weight.item()) == (None, [], 5.0)


def test_dropout_stays_off_and_norms_and_biases_are_trained():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.5,
        attention_dropout=0.5,
    )
    model = OPTForCausalLM(config).eval()
    blocks = find_blocks(model)
    tokens = torch.randint(64, (4, 16))
    (call, *_), hidden = capture_calls(model, blocks, tokens), embed(model, blocks, tokens)
    target = propagate(lambda h: call(blocks[0], h), hidden)
    history = LossHistory()
    trainer(1, history).fit(unit(blocks[0], call), datamodule=ReconstructionPairs(hidden, target, 3, batch_size=3))
    assert history.train == [0.0]  # with dropout the untouched block would miss its own output
    module = unit(blocks[0], call, random_masks(blocks[0]))
    before = copy.deepcopy(blocks[0].state_dict())
    trainer(1).fit(module, datamodule=ReconstructionPairs(hidden, target, 3, batch_size=3))
    changed = {name for name, tensor in blocks[0].state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"fc1.bias", "fc1.weight", "final_layer_norm.weight", "self_attn.q_proj.weight"} <= changed


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_learning_rate_goes_to_zero_over_the_units_own_steps(decay):
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    inputs = torch.randn(6, 2, 4)
    module = unit(LinearBlock(4), NOTHING, None, lambda p: torch.optim.SGD(p, lr=1.0), decay)
    trainer(2, Watch()).fit(module, datamodule=ReconstructionPairs(inputs, inputs, 6, batch_size=2))
    steps = torch.arange(6) / 6
    expected = {"linear": 1 - steps, "cosine": 0.5 * (1 + torch.cos(torch.pi * steps)), "constant": torch.ones(6)}
    assert rates == pytest.approx(expected[decay].tolist())


def test_scheduler_by_class_steps_once_an_epoch():
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    inputs = torch.randn(4, 2, 4)
    module = unit(
        LinearBlock(4),
        NOTHING,
        None,
        lambda p: torch.optim.SGD(p, lr=1.0),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5),
    )
    trainer(2, Watch()).fit(module, datamodule=ReconstructionPairs(inputs, inputs, 4, batch_size=2))
    assert rates == [1.0, 1.0, 0.5, 0.5]


def test_a_mask_for_a_layer_that_is_not_there_is_an_error():
    block, other = LinearBlock(4), LinearBlock(4)
    with pytest.raises(KeyError, match="is no linear layer of this part"):
        Reconstruction(Window([block], [NOTHING]), {other.linear: torch.ones(4, 4, dtype=torch.bool)})


def test_a_mask_is_applied_at_once():
    block = LinearBlock(4)
    norm = InputNorm()
    norm.add(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
    pruned = Wanda().prune(weight_of(block.linear), LayerStatistics(norm), Sparsity("2:4"))
    unit(block, NOTHING, {"linear": pruned.mask})
    assert torch.equal(block.linear.weight == 0, ~pruned.mask)


def test_nothing_is_left_to_be_moved_but_weights_when_a_training_ends(monkeypatch):
    teardown, left = Strategy.teardown, []

    def look(strategy: Strategy) -> None:
        states = [optimizer.state for optimizer in strategy.optimizers]
        left.append((len(states), sum(map(len, states)), [p.grad for p in strategy.lightning_module.parameters()]))
        teardown(strategy)

    monkeypatch.setattr(Strategy, "teardown", look)
    hidden = torch.randn(2, 4, 3, 8)
    trainer(2).fit(unit(LinearBlock(8), NOTHING), datamodule=ReconstructionPairs(*hidden, samples=4))
    assert left == [(1, 0, [None])]


class NoQuestions(TorchDispatchMode):
    """Where a tensor is asked for its value, on which a program waits until a device has computed it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor is asked for its value"
        return function(*args, **kwargs or {})


def test_a_step_does_not_wait_for_the_device_and_counts_by_its_parts_weight(monkeypatch):
    monkeypatch.setattr("lit_prune.ranks.count", lambda: 2)
    hidden, step = torch.randn(2, 4, 3, 8), Reconstruction.training_step
    pairs = ReconstructionPairs(*hidden, samples=4)
    batches = [pairs._train.__getitems__(rows) for rows in (Rows([0, 1, 2], 1.5), Rows([3], 0.0), Rows([3], 0.5))]
    monkeypatch.undo()
    assert [batch[2] for batch in batches] == [1.5, 0.0, 0.5]
    losses = []

    def watched(module: Reconstruction, batch: tuple, index: int) -> Tensor:
        losses.append(float(mean_squared_error(module(batch[0]), batch[1])))
        with NoQuestions():
            return step(module, batch, index)

    monkeypatch.setattr(Reconstruction, "training_step", watched)
    history = LossHistory()
    trainer(1, history).fit(unit(LinearBlock(8), NOTHING), DataLoader(batches, batch_size=None))
    assert history.train == [pytest.approx((3 * losses[0] + losses[2]) / 4)]
