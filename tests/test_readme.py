"""What the README shows works as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lit_prune.cli import main
from lit_prune.models import find_blocks, linear_layers, weight_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example(tmp_path):
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    (code,) = blocks("python")
    assert sum(bool(line.strip()) and "import" not in line for line in code.splitlines()) <= 16
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "by_hand")
    for block in find_blocks(model):
        for layer in linear_layers(block).values():
            assert ((weight_of(layer).reshape(-1, 4) == 0).sum(dim=1) == 2).all()


SHOWN = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
BASH = [block.replace("\\\n", " ") for text in SHOWN for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
INLINE = r"`((?:lit-prune fit --config|python benchmarks/)[ \w/.-]+)`"
COMMANDS = [line for block in BASH for line in block.splitlines()]
COMMANDS += [command for text in SHOWN for command in re.findall(INLINE, text)]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, monkeypatch, capsys):
    """Commands parse; what they do is tested elsewhere (`make` targets by name alone)."""
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if program == "python":
        assert (ROOT / arguments[0]).is_file()
        return
    assert program == "lit-prune"
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code in (0, None)
    assert "sparsity" in capsys.readouterr().out
