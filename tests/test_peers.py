"""The benchmark suite at the tiny model's size: it runs, goes on, and what it compares computes the same."""

import json
import os
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.peers import __main__ as suite
from benchmarks.peers import with_lit_prune
from benchmarks.peers.cells import Cell, cells
from benchmarks.peers.ground import Ground
from benchmarks.peers.table import exponent
from benchmarks.peers.worker import Clock, peak
from lit_prune.resources import machine

pytestmark = pytest.mark.usefixtures("without_plots")

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
SIZE = (8, 32)


@pytest.fixture(scope="session")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny configuration with fewer windows to measure perplexity on."""
    settings = yaml.safe_load(TINY.read_text())
    settings["evaluation"]["windows"] = 8
    file = tmp_path_factory.mktemp("config") / "little.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def worked_here(command: list[str], job: dict[str, Any], _: Path) -> dict[str, Any]:
    """What `worked` does, without a process of its own, which takes its time to import."""
    clock = Clock()
    versions = import_module(command[-1]).prune(job, clock)
    seconds = clock.seconds | {"process": sum(clock.seconds.values())}
    return {"seconds": seconds, "peak_memory_bytes": peak(), "versions": versions}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], dict[str, torch.Tensor]]:
    """The weights that a worker of ours saves, for a method and a sparsity."""
    folder = tmp_path_factory.mktemp("pruned")
    ground = Ground(TINY, folder)
    done: dict[str, dict[str, torch.Tensor]] = {}

    def weights(module: str, method: str, sparsity: str = "0.5") -> dict[str, torch.Tensor]:
        name = f"{module}-{method}-{sparsity.replace(':', 'of')}"
        if name not in done:
            job = {"method": method, "sparsity": sparsity, "epochs": 2, "samples": SIZE[0], "length": SIZE[1]}
            job |= {"model": str(ground.model(2)), "tokens": str(ground.tokens(*SIZE, 0))}
            job |= {"run": str(folder / f"{name}-run"), "result": str(folder / name)}
            worked_here([f"benchmarks.peers.{module}"], job, folder)
            done[name] = load_file(folder / name / "model.safetensors")
        return {key: tensor.float() for key, tensor in done[name].items() if key.endswith("proj.weight")}

    return weights


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_published_wanda_prunes_the_same_weights(pruned, sparsity: str) -> None:
    published, ours = (pruned(module, "Wanda", sparsity) for module in ("published", "with_lit_prune"))
    for name, weight in ours.items():
        assert torch.equal(weight, published[name]), name
        assert (weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_published_sparsegpt_prunes_nearly_the_same_weights(pruned, sparsity: str) -> None:
    published, ours = (pruned(module, "SparseGPT", sparsity) for module in ("published", "with_lit_prune"))
    wanda = pruned("with_lit_prune", "Wanda", sparsity)

    def agreement(other: dict[str, torch.Tensor], where: str = "") -> float:
        same = [((weight == 0) == (other[name] == 0)).flatten() for name, weight in ours.items() if where in name]
        return float(torch.cat(same).float().mean())

    # ours rounds a block to the stored half precision before the next one sees its output
    assert agreement(published, "layers.0.") > 0.999
    assert agreement(published) > 0.97
    assert agreement(wanda) < 0.9  # or the one above would say nothing
    if sparsity == "2:4":
        for weight in published.values():
            assert (weight.view(-1, 4) == 0).sum(1).eq(2).all()


@pytest.mark.parametrize("form", ["BR", "BR+GP"])
def test_published_training_takes_the_same_steps(pruned, form: str) -> None:
    """With one batch an epoch, so that the order of the sequences, which each draws for itself, is no difference."""
    published, ours, start = pruned("published", form), pruned("with_lit_prune", form), pruned("published", "Wanda")
    first = [name for name in ours if "layers.0." in name]  # later ones see what ours has rounded to half precision
    moved = sum(float((ours[name] - start[name]).square().sum()) for name in first)
    apart = sum(float((ours[name] - published[name]).square().sum()) for name in first)
    assert 0 < apart < 0.03 * moved
    for name, weight in published.items():
        assert (weight == 0).float().mean() == 0.5, name


def test_forms_of_training_differ(pruned) -> None:
    assert any(
        not torch.equal(weight, pruned("published", "BR")[n]) for n, weight in pruned("published", "BR+GP").items()
    )


def test_suite_measures_and_goes_on(little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = suite.worked
    done: list[str] = []

    def worked(command: list[str], job: dict[str, Any], folder: Path) -> dict[str, Any]:
        done.append(f"{job['tool']} {job['method']}")
        alone = job["tool"] == "published"  # one in a process of its own, as all are
        return (measured if alone else worked_here)(command, job, folder)

    monkeypatch.setattr(suite, "worked", worked)
    monkeypatch.setattr(suite, "rate", lambda: 1e11)  # a large matrix product takes its time
    results, page = tmp_path / "results", tmp_path / "peers.md"
    command = ["--config", str(little), "--sizes", "8x32", "--repeat", "1", "--results", str(results)]
    command += ["--output", str(page), "--only", "row-8x32-Wanda-0.5-published", "row-8x32-Wanda-0.5-lit-prune"]
    command += ["quality-8x32-recipe-0.7", "scale-32x256-3blocks-Wanda"]
    recipe = "--recipe=--model.mask=ADMM --model.reconstruction=block --trainer.max_epochs=1"
    suite.main([*command, recipe])
    assert done == ["published Wanda", "lit-prune Wanda", "lit-prune recipe", "lit-prune Wanda"]
    found = {file.stem: json.loads(file.read_text()) for file in results.glob("*.json")}
    published, ours = found["row-8x32-Wanda-0.5-published-0"], found["row-8x32-Wanda-0.5-lit-prune-0"]
    assert ours["sparsity"] == published["sparsity"] == 0.5
    assert ours["perplexity"] == pytest.approx(published["perplexity"], rel=1e-3)
    assert ours["perplexity"] > found["dense"]["perplexity"] > 1
    assert published["peak_memory_bytes"] > 100e6
    assert 0 < published["seconds"]["statistics"] < published["seconds"]["prune"] < published["seconds"]["process"]
    best = found["quality-8x32-recipe-0.7-lit-prune-0"]
    assert best["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert best["seconds"]["reconstruct"] > 0
    assert found["scale-32x256-3blocks-Wanda-0.5-lit-prune-0"]["perplexity"] is None
    text = page.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| Wanda, 0.5 | lit-prune"))
    assert f"| {ours['perplexity']:.2f} |" in row
    assert row.endswith("| 1.00 | 1.00 |")
    assert "| Wanda, 0.5 | llmcompressor | not measured" in text
    assert not re.search(r"\bnan\b|\binf\b", text)
    done.clear()
    suite.main([*command, recipe])
    assert not done  # all is there
    suite.main([*command, "--recipe=--model.mask=Magnitude"])
    assert done == ["lit-prune recipe"]  # and that of another recipe is not what is asked for


@pytest.mark.parametrize("other", ["machine", "config"])
def test_suite_refuses_results_of_another(other: str, tmp_path: Path) -> None:
    there = {"machine": machine(torch.device("cpu")), "config": "tiny.yaml 0123"}
    there |= {other: {"cpu": "abacus"}} if other == "machine" else {}
    (tmp_path / "dense.json").write_text(json.dumps(there))
    with pytest.raises(SystemExit, match=f"another {other}"):
        suite.main(["--results", str(tmp_path), "--output", str(tmp_path / "page.md"), "--only", "start"])


def test_every_draw_has_every_tool_before_the_next_begins() -> None:
    rows = [(cell.draw, cell.tool) for cell in cells([SIZE], 3) if cell.name == f"row-8x32-Wanda-0.5-{cell.tool}"]
    tools = ["llmcompressor", "torchao", "published", "lit-prune"]
    assert rows == [(draw, tool) for draw in range(3) for tool in tools]
    names = [cell.file for cell in cells([SIZE, (16, 32)], 3)]
    assert len(names) == len(set(names))


def test_command_has_what_the_job_says() -> None:
    job = {"method": "BR+GP", "sparsity": "2:4", "epochs": 3, "samples": 4, "length": 16, "model": "m", "run": "r"}
    assert {
        "--model.mask=Wanda", "--model.reconstruction=block", "--model.global_propagation=true", "--data.samples=4",
        "--model.sparsity=2:4", "--trainer.max_epochs=3", "--data.sequence_length=16", "--data.batch_size=8",
    } <= set(with_lit_prune.command(job))  # fmt: skip


def test_exponent() -> None:
    assert exponent([(n, 3.0 * n**2) for n in (1, 2, 4, 8)]) == "2.00"


def test_sparsity_counts_the_layers_of_the_blocks(tmp_path: Path) -> None:
    ground = Ground(TINY, tmp_path / "ground")
    saved = tmp_path / "saved"
    shutil.copytree(ground.model(2), saved)
    weights = load_file(saved / "model.safetensors")
    assert {int(found[1]) for name in weights if (found := re.search(r"layers\.(\d+)", name))} == {0, 1}
    inside = [name for name in weights if name.endswith("proj.weight")]
    dense = sum(int((weights[name] == 0).sum()) for name in inside)
    zeros = int((weights[inside[0]] != 0).sum())
    weights[inside[0]].zero_()
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    total = sum(weights[name].numel() for name in inside)
    assert ground.sparsity(saved, 2) == (dense + zeros) / total
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_tokens.weight' is no weight of a block"):
        ground.sparsity(saved, 2)


@pytest.mark.skipif(
    not os.environ.get("LIT_PRUNE_PEERS"),
    reason="makes environments of several GB out of a package index; LIT_PRUNE_PEERS=1 runs it",
)
@pytest.mark.parametrize(
    "cell",
    [
        Cell("row", "llmcompressor", "Magnitude", "0.5", *SIZE),
        Cell("row", "llmcompressor", "Wanda", "0.5", *SIZE),
        Cell("row", "llmcompressor", "SparseGPT", "2:4", *SIZE),
        Cell("row", "torchao", "Wanda", "0.5", *SIZE),
    ],
    ids=lambda cell: cell.name,
)
def test_peer_prunes(cell: Cell, tmp_path: Path) -> None:
    command = ["--config", str(TINY), "--sizes", "8x32", "--repeat", "1", "--results", str(tmp_path / "results")]
    suite.main([*command, "--output", str(tmp_path / "page.md"), "--only", cell.name])
    figures = json.loads((tmp_path / "results" / cell.file).read_text())
    # its magnitude modifier makes masks for a training, which `oneshot` does not apply
    assert figures["sparsity"] == pytest.approx(0.0 if cell.method == "Magnitude" else 0.5, abs=0.001)
    assert figures["perplexity"] < 60
