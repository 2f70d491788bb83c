"""What the command answers: help, errors, and how fast."""

import inspect
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lit_prune import __version__, masks
from lit_prune.cli import main
from lit_prune.fit import CLASSES

ROOT = Path(__file__).parent.parent
TINY = ["--config", "configs/tiny.yaml"]
NOWHERE = ["--output_dir", "runs/that-is-never-made"]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("flag", "expected"), [("--help", "fit "), ("--version", f"lit-prune {__version__}")])
@pytest.mark.parametrize("launcher", [["-m", "lit_prune"], ["cli.py"]])
def test_help_and_version_are_quick(flag, expected, launcher):
    start = time.perf_counter()
    answer = subprocess.run([sys.executable, *launcher, flag], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2
    assert expected in answer.stdout


def complaint(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("lit-prune: ")
    assert "<class" not in captured.err
    return captured.err


def test_verbs_and_keys_that_are_unknown(capsys):
    assert "There is no verb 'fti', did you mean 'fit'?" in complaint(capsys, "fti")
    assert "'model.sparsty', did you mean 'model.sparsity'?" in complaint(
        capsys, "fit", *TINY, *NOWHERE, "--model.sparsty", "1"
    )
    assert "'trainer.max_epoch', did you mean 'trainer.max_epochs'?" in complaint(
        capsys, "fit", *TINY, *NOWHERE, "--trainer.max_epoch", "1"
    )
    assert "no class 'Wandaa', did you mean 'Wanda'?" in complaint(capsys, "fit", *TINY, "--model.mask", "Wandaa")


def test_an_unknown_key_in_a_file(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("model:\n  sparsty: 0.5\n")
    said = complaint(capsys, "fit", *TINY, "--config", str(tmp_path / "config.yaml"))
    assert "'model.sparsty', did you mean 'model.sparsity'?" in said


def test_fit_without_a_configuration_points_to_the_tiny_one(capsys):
    said = complaint(capsys, "fit")
    assert "model.checkpoint, model.sparsity, output_dir" in said
    assert "lit-prune fit --config configs/tiny.yaml" in said


def tiny_copy(folder: Path, change) -> str:
    """The tiny model with other weights or without some of its files."""
    folder.mkdir()
    for file in (ROOT / "tiny" / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    return str(folder)


def poison(value: float):
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


BAD_CHECKPOINTS = {
    "NaN": (poison(float("nan")), "1 NaN or infinite values in 'model.layers.2.mlp.up_proj.weight'"),
    "infinite": (poison(float("inf")), "1 NaN or infinite values in 'model.layers.2.mlp.up_proj.weight'"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "cannot be read",
    ),
}


@pytest.mark.parametrize(("change", "expected"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS.keys())
def test_bad_checkpoint(capsys, tmp_path, change, expected):
    checkpoint = tiny_copy(tmp_path / "model", change)
    output = tmp_path / "run"
    said = complaint(capsys, "fit", *TINY, "--model.checkpoint", checkpoint, "--output_dir", str(output))
    assert "model.checkpoint: " in said
    assert expected in said
    assert not output.exists()


BAD_SETTINGS = {
    "no such folder": (["--model.checkpoint", "./nope"], "model.checkpoint: there is no folder './nope'"),
    "no such hub id": (["--model.checkpoint", "nobody/nothing"], "model.checkpoint: no checkpoint 'nobody/nothing'"),
    "sparsity above": (["--model.sparsity", "1.0"], "model.sparsity: '1.0' is outside [0, 1)"),
    "sparsity below": (["--model.sparsity=-0.1"], "model.sparsity: '-0.1' is outside [0, 1)"),
    "2:1": (["--model.sparsity", "2:1"], "model.sparsity: '2:1' does not keep"),
    "0:4": (["--model.sparsity", "0:4"], "model.sparsity: '0:4' does not keep"),
    "2:x": (["--model.sparsity", "2:x"], "model.sparsity: '2:x' is no pattern"),
    "3:7": (["--model.sparsity", "3:7"], "in 3:7, 7 does not divide the 128 inputs of 'model.layers.0.self_attn.q"),
    "text missing": (["--data.source", "nope.txt"], "data.source: there is no file or folder 'nope.txt'"),
    "text too short": (["--data.samples", "100000"], "data.source: 'tiny/text/calibration.txt' holds "),
    "evaluation text missing": (["--evaluation.texts", "[nope.txt]"], "evaluation.texts: there is no file"),
    "evaluation text too short": (["--evaluation.windows", "99999"], "evaluation.texts: 'tiny/text/held_out.txt'"),
    "zero samples": (["--data.samples", "0"], "data.samples: 0 is too few"),
    "zero batch": (["--data.batch_size", "0"], "data.batch_size: 0 is too few"),
    "too long": (["--data.sequence_length", "100000"], "data.sequence_length: 100000 is more than the model's 512"),
    "windows too long": (["--evaluation.window_length", "9999"], "evaluation.window_length: 9999 is more than"),
    "no seed": (["--seed_everything", "false"], "seed_everything: 'false' does not fit"),
    "epochs": (["--trainer.max_epochs", "many"], "trainer.max_epochs: 'many' does not fit; give int or null"),
    "accelerator": (["--trainer.accelerator", "abacus"], "trainer: "),
    "no config": (["--config", "nope.yaml"], "config: "),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_setting(capsys, tmp_path, settings, expected):
    output = tmp_path / "run"
    said = complaint(capsys, "fit", *TINY, "--output_dir", str(output), *settings)
    assert expected in said
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", "holds no text"), (b"caf\xe9 au lait", "is not UTF-8 (byte 3)")]
)
def test_bad_text_file(capsys, tmp_path, content, expected):
    (tmp_path / "text.txt").write_bytes(content)
    said = complaint(
        capsys, "fit", *TINY, "--data.source", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "run")
    )
    assert expected in said


def test_output_folders_that_will_not_do(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("here first")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("not a run")
    assert "is a file; give a folder" in complaint(capsys, "fit", *TINY, "--output_dir", str(tmp_path / "file"))
    assert "is a file; give a folder" in complaint(capsys, "fit", *TINY, "--output_dir", str(tmp_path / "file/run"))
    assert "is not empty and holds no run" in complaint(capsys, "fit", *TINY, "--output_dir", str(tmp_path / "full"))
    assert "cannot be written" in complaint(capsys, "fit", *TINY, "--output_dir", "/proc/run")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    said = complaint(capsys, "fit", *TINY, "--output_dir", str(tmp_path / "run"))
    assert "1e-06 GB are free" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("offload", "sequential", "ways"),
    [
        ("false", "false", "give model.offload true, fewer data.samples, or fewer evaluation.windows."),
        ("true", "true", "give no model.true_sequential, fewer data.samples, or fewer evaluation.windows."),
    ],
)
def test_too_little_memory_is_told_before_anything_is_written(capsys, tmp_path, monkeypatch, offload, sequential, ways):
    monkeypatch.setattr("lit_prune.preflight.available_memory", lambda _: 10_000_000)
    settings = f"--model.offload={offload}", f"--model.true_sequential={sequential}", "--model.reconstruction=none"
    said = complaint(capsys, "fit", *TINY, *settings, "--output_dir", str(tmp_path / "run"))
    assert f"but 0.01 GB are free; {ways}" in said
    assert not (tmp_path / "run").exists()


def test_patterns_in_a_file_need_no_quotes(tmp_path, capsys):
    for written in ("2:4", "'2:4'", "2:4  # half", "16:32"):
        (tmp_path / "config.yaml").write_text(f"model:\n  sparsity: {written}\n")
        with pytest.raises(SystemExit):
            main(["fit", *TINY, "--config", str(tmp_path / "config.yaml"), "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["sparsity"] == written.split()[0].strip("'")


def test_later_configurations_and_overrides_win(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("data: {samples: 7, batch_size: 3}\n")
    settings = ["--data.samples", "5", "--optimizer.lr", "0.5", "--lr_scheduler", "cosine", "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", *TINY, "--config", str(tmp_path / "config.yaml"), *settings])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["data"]["samples"], printed["data"]["batch_size"]) == (5, 3)
    assert printed["optimizer"]["init_args"]["lr"] == 0.5
    assert printed["lr_scheduler"] == "cosine"


@pytest.mark.parametrize("name", CLASSES["model.mask"])
def test_a_mask_that_is_chosen_brings_its_own_defaults(name, tmp_path, capsys):
    """And none of the mask's that it takes the place of, such as the rows that Wanda compares."""
    own = {key: value.default for key, value in inspect.signature(getattr(masks, name)).parameters.items()}
    (tmp_path / "config.yaml").write_text(f"model: {{mask: {name}}}\n")
    for chosen in (["--config", str(tmp_path / "config.yaml")], ["--model.mask", "ADMM", "--model.mask", name]):
        for before in (TINY, ["--config", "configs/quickstart.yaml"]):
            with pytest.raises(SystemExit):
                main(["fit", *before, *chosen, "--print_config"])
            mask = yaml.safe_load(capsys.readouterr().out)["model"]["mask"]
            assert mask["class_path"].endswith(f".{name}")
            assert mask.get("init_args", {}) == own


def test_shell_completion(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--print_completion", "shtab-bash"])
    script = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--model.sparsity" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_parses(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--print_config"])
    assert stop.value.code in (0, None)
    written, printed = yaml.safe_load(config.read_text()), yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["source"] == written["data"]["source"]
    assert torch.tensor(printed["optimizer"]["init_args"]["betas"]).shape == (2,)


@pytest.mark.parametrize(
    ("verb", "setting"),
    [("generate", "--max_tokens"), ("evaluate", "--task_source"), ("report", "RUN [RUN ...]"), ("export", "--format")],
)
def test_help_is_quick(verb, setting):
    """It waits for none of the libraries that take seconds to import."""
    code = f"""
import sys
from lit_prune.cli import main
try:
    main(["{verb}", "--help"])
except SystemExit as stop:
    assert not stop.code
print("slow:", sorted({{"torch", "lightning", "transformers", "datasets", "matplotlib"}} & sys.modules.keys()))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert setting in answer.stdout
    assert answer.stdout.splitlines()[-1] == "slow: []"
