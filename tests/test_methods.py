"""Every mask method, solver, skip, sparsity by name and allocation, as a user runs them on the tiny model."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_prune import masking, preflight, run
from lit_prune.cli import main
from lit_prune.fit import CLASSES
from lit_prune.masks import bits

pytestmark = pytest.mark.usefixtures("without_plots")

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
DENSE = load_file(ROOT / "tiny" / "model" / "model.safetensors")
SHORT = ["--data.samples", "8", "--data.validation_samples", "2", "--data.sequence_length", "32"]
SHORT += ["--evaluation.windows", "4", "--trainer.max_epochs", "1"]
ALONE = ["--model.reconstruction", "none"]
MASKS = CLASSES["model.mask"]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def fit(folder: Path, *settings: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(TINY), "--output_dir", str(folder), *SHORT, *settings])
    assert stop.value.code == 0
    return json.loads((folder / "metrics.json").read_text())


def complaint(capsys, *settings: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(TINY), "--output_dir", "runs/that-is-never-made", *SHORT, *settings])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1, said
    assert not Path("runs/that-is-never-made").exists()
    return said.removeprefix("lit-prune: ").rstrip()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def pruned(folder: Path, pattern: str = "*_proj.weight") -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(folder).items() if fnmatchcase(name, pattern)}


def masks(folder: Path, index: int) -> dict[str, torch.Tensor]:
    """The packed masks of a finished block by layer."""
    tensors = load_file(folder / "blocks" / f"{index:03d}.safetensors")
    return {name.removeprefix("mask:"): tensor for name, tensor in tensors.items() if name.startswith("mask:")}


def test_all_masks_are_offered():
    assert MASKS == [
        "ADMM", "ALPS", "GBLM", "Magnitude", "MutualInformation", "Random", "RegionalGradient", "SparseGPT", "Wanda",
    ]  # fmt: skip


@pytest.mark.parametrize(("sparsity", "reconstruction"), [("0.5", "none"), ("1:4", "block")])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "MutualInformation"])
def test_every_mask_keeps_what_is_promised(tmp_path, mask, sparsity, reconstruction):
    metrics = fit(
        tmp_path, "--model.mask", mask, "--model.sparsity", sparsity, "--model.reconstruction", reconstruction
    )
    share = 0.5 if sparsity == "0.5" else 0.75
    result = weights(tmp_path)
    for index in range(4):
        for name, kept in masks(tmp_path, index).items():
            weight = result[f"model.layers.{index}.{name}.weight"]
            kept = bits.unpack(kept, weight.shape)
            assert weight.isfinite().all()
            assert not weight[~kept].any()
            assert int((~kept).sum()) == weight.numel() * share, name
            if sparsity == "1:4":
                assert torch.all(kept.view(-1, 4).sum(1) == 1)
    assert metrics["sparsity"] == pytest.approx(share, abs=1e-3)  # some dense weights are 0
    changed = mask in ("SparseGPT", "ADMM", "ALPS") or reconstruction == "block"
    assert (metrics["perplexity"]["masked"] != metrics["perplexity"]["pruned"]) == changed
    assert metrics["method"]["updates_weights"] == (mask in ("SparseGPT", "ADMM", "ALPS"))


@pytest.mark.parametrize("mask", ["Wanda", "SparseGPT", "MutualInformation"])
def test_solvers_follow_any_mask(tmp_path, mask):
    settings = [*ALONE, "--model.mask", mask, "--model.sparsity", "0.5", "--data.samples", "64"]
    before = fit(tmp_path / "mask", *settings)
    for solver in ("ADMM", "ConjugateGradient"):
        after = fit(tmp_path / solver, *settings, "--model.solver", solver)
        assert after["error"] < before["error"]
        # the first block's mask does not depend on what was solved before
        one, other = masks(tmp_path / "mask", 0), masks(tmp_path / solver, 0)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(weight.isfinite().all() for weight in pruned(tmp_path / solver).values())
        assert after["perplexity"]["pruned"]["held_out"] < after["perplexity"]["masked"]["held_out"]


def test_both_ways_to_the_gradients_give_the_same_model(tmp_path):
    settings = [*ALONE, "--model.mask", "GBLM"]
    fit(tmp_path / "blocks", *settings)
    fit(tmp_path / "model", *settings, "--model.mask.backward", "model")
    fit(tmp_path / "wanda", *ALONE)
    one, other, wanda = (pruned(tmp_path / name) for name in ("blocks", "model", "wanda"))
    same = [float(((one[name] == 0) == (other[name] == 0)).float().mean()) for name in one]
    assert min(same) > 0.999
    assert not all(torch.equal(one[name], wanda[name]) for name in one)
    left = {path.name for path in (tmp_path / "blocks").iterdir()}
    assert not left & {"gradients", "hidden"}


def test_a_broken_run_reads_its_gradients_again(tmp_path, monkeypatch):
    settings = ["--model.mask", "GBLM"]
    whole = tmp_path / "whole"
    fit(whole, *settings)
    commit = run.Run._commit

    def breaking(self, round_, final, pending):
        if round_.index == 2:
            raise KeyboardInterrupt
        commit(self, round_, final, pending)

    broken = tmp_path / "broken"
    monkeypatch.setattr(run.Run, "_commit", breaking)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(TINY), "--output_dir", str(broken), *SHORT, *settings])
    assert stop.value.code == 130
    assert sorted(path.name for path in (broken / "gradients").iterdir()) == ["002.safetensors", "003.safetensors"]
    monkeypatch.setattr(run.Run, "_commit", commit)
    monkeypatch.setattr(masking, "blockwise_gradients", None)  # not to be asked for again
    fit(broken, *settings)
    a, b = weights(whole), weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_whole_model_way_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda device: 1_000_000)
    settings = ["--model.mask", "GBLM", "--model.mask.backward", "model", "--model.offload", "false"]
    said = complaint(capsys, *settings)
    assert said.startswith("model.mask: GBLM with backward 'model' needs 0.0")
    assert "give backward 'blocks'" in said


@pytest.mark.parametrize(("estimator", "reconstruction"), [("gaussian", "none"), ("renyi", "block")])
def test_sliced_neurons_are_gone_and_the_model_is_the_masked_one(tmp_path, estimator, reconstruction):
    settings = ["--model.mask", "MutualInformation", "--model.sparsity", "0.25"]
    settings += ["--model.mask.estimator", estimator, "--model.reconstruction", reconstruction]
    masked = fit(tmp_path / "masked", *settings)
    sliced = fit(tmp_path / "sliced", *settings, "--model.mask.slice", "true")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").float() for name in ("masked", "sliced")]
    assert models[1].config.intermediate_size == models[0].config.intermediate_size * 3 // 4
    gone = sliced["parameters"]["dense"] - sliced["parameters"]["saved"]
    assert gone == sum(p.numel() for p in models[0].parameters()) - sum(p.numel() for p in models[1].parameters()) > 0
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = [model(tokens).logits for model in models]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    # some dense weights are 0, a few more of them once they are rounded
    assert sliced["sparsity"] == masked["sparsity"] == pytest.approx(0.25, abs=1e-4)
    assert sliced["perplexity"]["pruned"]["held_out"] == pytest.approx(masked["perplexity"]["pruned"]["held_out"], 1e-4)
    for name, tensor in pruned(tmp_path / "masked", "*.self_attn.*").items():
        assert tensor.all(), name
    assert not [name for name in masks(tmp_path / "masked", 0) if "self_attn" in name]


@pytest.mark.parametrize("skip", ["*.k_proj", "[model.layers.0.*, '*.down_proj']"])
def test_skipped_layers_stay_dense(tmp_path, skip):
    metrics = fit(tmp_path, *ALONE, "--model.skip", skip, "--model.sparsity", "0.5")
    patterns = ["*.k_proj.*"] if skip == "*.k_proj" else ["model.layers.0.*", "*.down_proj.*"]
    zeros = total = 0
    for name, weight in pruned(tmp_path).items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            assert torch.equal(weight, DENSE[name])
        else:
            assert int((weight == 0).sum()) == weight.numel() // 2
            zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    assert metrics["sparsity"] == zeros / total == 0.5
    first = metrics["blocks"][0]
    assert first["sparsity"] == (None if "layers.0" in skip else 0.5)
    assert (first["error"]["after"] == 0) == ("layers.0" in skip)
    page = (tmp_path / "report.html").read_text()
    assert "layers left dense" in page


def test_a_skipped_layer_is_trained_with_its_block(tmp_path):
    fit(tmp_path, "--model.skip", "*.k_proj")
    for name, weight in pruned(tmp_path, "*.k_proj.weight").items():
        assert weight.all()
        assert not torch.equal(weight, DENSE[name])


def test_of_several_patterns_the_last_counts(tmp_path):
    own = '{"*_proj": 0.75, "*.down_proj": "2:4", "model.layers.1.mlp.down_proj": 0.25}'
    fit(tmp_path, *ALONE, "--model.sparsities", own)
    for name, weight in pruned(tmp_path).items():
        share = float((weight == 0).float().mean())
        if name == "model.layers.1.mlp.down_proj.weight":
            assert share == 0.25
        elif "down_proj" in name:
            assert torch.all((weight.view(-1, 4) == 0).sum(1) == 2)
        else:
            assert share == 0.75


@pytest.mark.parametrize("allocation", ["OWL", "ByError"])
def test_allocation_keeps_the_total(tmp_path, allocation):
    settings = [*ALONE, "--model.allocation", allocation, "--model.allocation.spread", "0.1"]
    metrics = fit(tmp_path, *settings, "--model.sparsity", "0.6")
    assert metrics["sparsity"] == pytest.approx(0.6, abs=0.006)  # rounded down in every row of 128 weights
    shares = list(metrics["allocation"].values())
    assert max(shares) - min(shares) == pytest.approx(0.2)
    for block, share in zip(metrics["blocks"], shares, strict=True):
        assert block["sparsity"] == pytest.approx(share, abs=0.008)


BAD = {
    "unknown solver": (["--model.solver", "Wanda"], "model.solver: there is no class 'Wanda'; give ADMM or Conjug"),
    "abstract": (["--model.mask", "ScoreMask"], "model.mask: "),
    "iterations": (["--model.mask", "ADMM", "--model.mask.iterations", "0"], "model.mask.iterations: 0 does not fit"),
    "mask_iterations": (
        ["--model.mask", "ADMM", "--model.mask.mask_iterations", "21"],
        "model.mask.mask_iterations: 21 does not fit; give 1 to 20.",
    ),
    "ridge": (["--model.solver", "ADMM", "--model.solver.ridge", "-1"], "model.solver.ridge: -1.0 does not fit"),
    "block_size": (["--model.mask", "SparseGPT", "--model.mask.block_size", "0"], "model.mask.block_size: 0 does not"),
    "dampening": (["--model.mask", "SparseGPT", "--model.mask.dampening", "-1"], "model.mask.dampening: -1.0 does"),
    "p": (["--model.mask", "GBLM", "--model.mask.p", "3"], "model.mask.p: '3' is neither 1 nor 2; give 1"),
    "not a number": (["--model.mask", "ADMM", "--model.mask.penalty", "x"], "model.mask.penalty: 'x' does not"),
    "no such setting": (["--model.mask.alpha", "3"], "model.mask: Wanda has no setting 'alpha'; it has granularity."),
    "estimator": (
        ["--model.mask", "MutualInformation", "--model.mask.estimator", "x"],
        "model.mask.estimator: 'x' does not fit; give gaussian or renyi.",
    ),
    "setting before class": (["--model.allocation.spread", "2"], "model.allocation: give its class before"),
    "spread": (["--model.allocation", "OWL", "--model.allocation.spread", "2"], "model.allocation.spread: 2.0 does"),
    "skip matches nothing": (["--model.skip", "*.kproj"], "model.skip: '*.kproj' matches no layer"),
    "all skipped": (["--model.skip", "*"], "model.skip: * leaves no layer to prune; skip fewer."),
    "sparsities match nothing": (["--model.sparsities", '{"x": 0.5}'], "model.sparsities: 'x' matches no layer"),
    "sparsity by name": (["--model.sparsities", '{"*.q_proj": 1.5}'], "model.sparsities: '1.5' is outside [0, 1)"),
    "pattern by name": (["--model.sparsities", '{"*.q_proj": "3:7"}'], "model.sparsity: in 3:7, 7 does not divide"),
    "n:m and allocation": (["--model.allocation", "OWL", "--model.sparsity", "2:4"], "model.allocation: OWL shares"),
    "n:m of neurons": (
        ["--model.mask", "MutualInformation", "--model.sparsity", "2:4"],
        "model.sparsity: MutualInformation prunes whole neurons, not n of every m weights",
    ),
    "half an MLP": (
        ["--model.mask", "MutualInformation", "--model.skip", "*.up_proj"],
        "model.mask: MutualInformation prunes whole neurons, but the MLP of 'model.layers.0' has more than",
    ),
    "slices of several widths": (
        ["--model.mask", "MutualInformation", "--model.mask.slice", "true", "--model.skip", "*.0.mlp.*"],
        "model.mask: MutualInformation with slice needs as many neurons in every block",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_settings_get_one_sentence(capsys, settings, expected):
    assert complaint(capsys, *settings).startswith(expected)
