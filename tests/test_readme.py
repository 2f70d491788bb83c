"""What the README and the docs show works as it stands there, on little: a short text, few sequences, two blocks."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from conftest import compile_anew
from transformers import AutoModelForCausalLM

from lit_prune import masks
from lit_prune.cli import main
from lit_prune.errors import BadInput
from lit_prune.fit import CLASSES
from lit_prune.masks import solvers
from lit_prune.method import Pruning
from lit_prune.models import find_blocks, linear_layers, weight_of

pytestmark = pytest.mark.usefixtures("without_plots")

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *DOCS]}

SMALL = {"data.samples": 4, "data.validation_samples": 2, "data.sequence_length": 32, "trainer.max_epochs": 1}
SMALL |= {"evaluation.windows": 2, "evaluation.window_length": 32, "evaluation.references": False}
LESS = {"fit": [f"--{key}={value}" for key, value in SMALL.items()], "generate": ["--texts=2", "--max_tokens=40"]}
LESS["evaluate"] = ["--windows=2"]
"""What makes a verb's work small."""

CHECKED = ("docs/methods.md", "docs/masks", "docs/solvers", "docs/allocation", "docs/forms")
CHECKED += ("docs/how_to/gaudi.md", "docs/how_to/gpu.md", "docs/how_to/many_gpus.md")
"""Pages of what other tests run: their commands check everything, and prune nothing."""

ELSEWHERE = (
    r"^(?!.*'runs/).*could (not )?be loaded|could not be fetched|is not installed|no token for the hub|converter|GPU"
)
"""What is said that needs a hub, an optional package, another tool, or a GPU."""

MADE = {
    "tiny": "0.6",
    "quickstart": "0.5",
    "wanda": "0.5",
    "sparsegpt": "0.5",
    "wanda_block": "0.5",
    "wanda-br-gp": "0.5",
    "0.5": "0.5",
    "0.7": "0.7",
    "0.9": "0.9",
    "2_4": "2:4",
}
"""Runs that pages take for granted, and their sparsities."""

Snippet = tuple[str, str, str]
"""Page, language (an inline command is `inline`), and text."""


def snippets() -> list[Snippet]:
    """In the order in which they stand on their pages."""
    inline = r"`((?:lit-prune fit --config|python benchmarks/)[ \w/.-]+)`"
    found: list[Snippet] = []
    for page, text in PAGES.items():
        for match in re.finditer(rf"^```(\w+)\n(.*?)^```|{inline}", text, re.DOTALL | re.MULTILINE):
            language, block, command = match.groups()
            if command:
                found.append((page, "inline", command))
            elif language in ("bash", "sh"):
                found += [(page, "bash", line) for line in block.replace("\\\n", " ").splitlines()]
            elif language in ("python", "yaml"):
                found.append((page, language, block))
    return found


def named(snippet: Snippet) -> str:
    page, language, text = snippet
    return f"{page.removeprefix('docs/')}: {' '.join(text.split())[:60] if language != 'python' else language}"


def makes(page: str, name: str) -> bool:
    """Whether a command of the page makes a run, which is left out where it takes minutes; `tiny` is the default."""
    commands = [text for where, language, text in snippets() if (where, language) == (page, "bash")]
    fits = [text for text in commands if re.match(r"lit-prune fit (?!.*quickstart)", text)]
    into = [re.search(r"--output_dir (\S+)", text) for text in fits]
    return f"runs/{name}" in [found[1] if found else "runs/tiny" for found in into]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for each page that looks like a checkout, on little; its snippets find what earlier ones made."""
    made: dict[str, Path] = {}
    runs = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        if not (runs / name).exists():
            tiny = ["--config", str(ROOT / "configs" / "tiny.yaml"), "--model.reconstruction", "none"]
            tiny += ["--model.checkpoint", str(ROOT / "tiny" / "model"), "--model.sparsity", MADE[name]]
            tiny += ["--data.source", str(ROOT / "tiny" / "text" / "calibration.txt")]
            tiny += ["--evaluation.texts", f"[{ROOT / 'tiny' / 'text' / 'held_out.txt'}]"]
            with pytest.raises(SystemExit) as stop:
                main(["fit", *tiny, *LESS["fit"], "--output_dir", str(runs / name)])
            assert stop.value.code == 0
        return runs / name

    def folder(page: str) -> Path:
        if page not in made:
            made[page] = here = tmp_path_factory.mktemp("checkout")
            for name in ("configs", "benchmarks", "Makefile"):
                (here / name).symlink_to(ROOT / name)
            (here / "tiny" / "text").mkdir(parents=True)
            shutil.copytree(ROOT / "tiny" / "model", here / "tiny" / "model")
            config = here / "tiny" / "model" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
            for text in (ROOT / "tiny" / "text").glob("*.txt"):
                (here / "tiny" / "text" / text.name).write_text(text.read_text()[:40_000])
            (here / "runs").mkdir()
            for name in MADE:
                if re.search(rf"runs/{re.escape(name)}(?![\w-])", PAGES[page]) and not makes(page, name):
                    (here / "runs" / name).symlink_to(run(name))
        return made[page]

    return folder


@pytest.mark.parametrize("snippet", snippets(), ids=named)
def test_it_works(snippet: Snippet, checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    page, language, text = snippet
    monkeypatch.chdir(checkout(page))
    capsys.readouterr()  # what making it said
    monkeypatch.syspath_prepend(checkout(page))  # as PYTHONPATH=. does
    if language == "python":
        try:
            run_python(text)
        except BadInput as error:
            if not re.search(ELSEWHERE, str(error)):
                raise
            pytest.skip(str(error))
    elif language == "yaml":
        Path("shown.yaml").write_text(text)
        parsed(["fit", "--config", "configs/tiny.yaml", "--config", "shown.yaml"], capsys)
    else:
        run_command(shlex.split(text, comments=True), page, language == "inline", monkeypatch, capsys)


def run_python(code: str) -> None:
    """Run a snippet, or write the file that its first line names."""
    if file := re.match(r"# ([\w/]+\.py)\n", code):
        Path(file[1]).write_text(code)
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


def run_command(command: list[str], page: str, only_parse: bool, monkeypatch, capsys) -> None:
    while command and re.match(r"[A-Z_]+=", command[0]):
        monkeypatch.setenv(*command.pop(0).split("=", 1))
    if not command:
        return
    program, *arguments = command
    if program == "torchrun":  # which would start the tests again; test_ranks starts processes
        program, arguments = "lit-prune", arguments[arguments.index("lit_prune") + 1 :]
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", Path("Makefile").read_text(), re.MULTILINE)
        pytest.skip("a target, whose commands are tested by themselves")
    if program == "python":
        assert Path(arguments[0]).is_file()
        pytest.skip("a measurement takes minutes")
    if program == "tensorboard":
        pytest.skip("a server")
    assert program == "lit-prune"
    verb = arguments[0]
    if verb == "fit":
        settings = parsed(arguments, capsys)
        if only_parse:
            return
        if settings["model"]["checkpoint"].startswith("package://"):
            pytest.skip("needs a package of 100 MB and minutes")
    if "--model.compile" in arguments:  # PyTorch's own compiler takes half a minute; test_gpu calls it
        compile_anew(monkeypatch, backend="aot_eager")
    own = ["--data.self_generated_samples=1"] if "--data.self_generated" in arguments else []
    trial = ["--dry_run", "--trainer.devices=1"] if verb == "fit" and page.startswith(CHECKED) else []
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *LESS.get(verb, []), *own, *trial])
    said = capsys.readouterr().err
    if stop.value.code == 2 and re.search(ELSEWHERE, said):
        pytest.skip(said.strip())
    assert stop.value.code in (0, None), said


def parsed(arguments: list[str], capsys: pytest.CaptureFixture) -> dict:
    """The settings that a command resolves to."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    said = capsys.readouterr()
    assert stop.value.code in (0, None), said.err
    return yaml.safe_load(said.out)


def test_the_loop_by_hand_keeps_its_pattern_in_few_lines(checkout: Callable[[str], Path]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL)
    assert sum(bool(line.strip()) and "import" not in line for line in code.splitlines()) <= 16
    result = checkout("README.md") / "runs" / "by_hand"
    if not result.exists():
        os.chdir(checkout("README.md"))
        run_python(code)
    for block in find_blocks(AutoModelForCausalLM.from_pretrained(result)):
        for layer in linear_layers(block).values():
            assert ((weight_of(layer).reshape(-1, 4) == 0).sum(dim=1) == 2).all()


def test_what_runs_where_names_tests_that_are_there() -> None:
    table = [
        line.strip("| ").split(" | ") for line in PAGES["docs/hardware.md"].splitlines() if re.match(r"\| [^|]", line)
    ]
    assert table
    for _, *cells in table:
        assert len(cells) == 5
        for cell in cells:
            links = re.findall(r"\[(test_\w+)\]\(\.\./(tests/\w+\.py)\)", cell)
            assert links or cell in ("not tested", "one device", "-")
            for test, file in links:
                assert f"def {test}(" in (ROOT / file).read_text()


def test_every_method_has_a_page() -> None:
    for key, folder in (("model.mask", "masks"), ("model.solver", "solvers"), ("model.allocation", "allocation")):
        pages = {path.stem.replace("_", "") for path in (ROOT / "docs" / folder).glob("*.md")}
        assert pages == {name.lower() for name in CLASSES[key] if name in vars(masks) or name in vars(solvers)}
    forms = get_args(get_type_hints(Pruning)["reconstruction"])
    assert {path.stem for path in (ROOT / "docs" / "forms").glob("*.md")} == {*forms, "global_propagation"} - {"none"}
