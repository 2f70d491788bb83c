"""Comparisons mark as best only what may be compared, and show the runs' own figures in every format."""

import copy
import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_reporting import EVALUATION, Page, finished_run

from lit_prune.cli import main
from lit_prune.finished import FinishedRun
from lit_prune.reporting.compared import Compared, differences, name_runs
from lit_prune.reporting.comparison import reading_aid, tables
from lit_prune.reporting.comparison_plots import errors_figure, looks, perplexity_figure
from lit_prune.reporting.sheet import Table
from lit_prune.reporting.tables import comma_separated, latex, markdown

SETTINGS: dict[str, Any] = {"seed_everything": 0, "model": {"sparsity": "0.5", "mask": {"class_path": "x.Wanda"}}}


def a_run(label: str, evaluation: Any = None, settings: Any = None, **changes: Any) -> Compared:
    """A finished run whose metrics differ in whole sections, or in the keys of a section that is a mapping."""
    metrics = finished_run()
    for key, value in changes.items():
        metrics[key] = {**metrics[key], **value} if isinstance(metrics.get(key), dict) else value
    config = copy.deepcopy(SETTINGS)
    config["model"] |= settings or {}
    config["output_dir"] = f"runs/{label}"
    return Compared(label, FinishedRun(Path(label), metrics, yaml.safe_dump(config), evaluation))


def perplexity(dense: float | None, pruned: float) -> dict[str, Any]:
    return {"dense": {"wiki": dense}, "masked": None, "pruned": {"wiki": pruned}}


def table(runs: list[Compared], name: str) -> Table:
    return next(table for table in tables(runs) if table.name == name)


def best(runs: list[Compared], name: str) -> dict[str, list[str]]:
    """The runs marked in every column, by its label and place."""
    found = table(runs, name)
    return {
        column.label: [row[0] for row, cell in zip(found.rows, column.cells, strict=True) if cell.best]
        for column in found.columns
    }


def test_the_best_is_the_least_perplexity_and_the_greatest_accuracy() -> None:
    better = copy.deepcopy(EVALUATION)
    better["zero_shot"]["tasks"]["rte"]["pruned"]["value"] = 0.6
    better["divergence"]["wiki"] = {"convention": "first 8 windows", "kl": 0.5, "top1_agreement": 0.8}
    one = a_run("one", EVALUATION, perplexity=perplexity(20.0, 30.0))
    two = a_run("two", better, perplexity=perplexity(20.0, 31.0), seconds={"load": 1.0, "mask": 3.0})
    assert best([one, two], "quality")["sparsity"] == []
    assert [row for row, *_ in table([one, two], "quality").rows] == ["dense", "one", "two"]
    shown = {
        column.cells[0].value: [cell.best for cell in column.cells]
        for column in table([one, two], "quality").columns
        if column.label == "perplexity, wiki"
    }
    assert shown == {20.0: [False, True, False], 19.0: [False, True, True]}, "by the run, and by evaluate otherwise"
    assert best([one, two], "zero_shot") == {"rte": ["two"], "boolq": ["one", "two"], "mean": ["one", "two"]}
    assert best([one, two], "divergence") == {"KL, wiki": ["one"], "top-1 agreement, wiki": ["two"]}
    cost = best([one, two], "cost")
    assert (cost["load"], cost["mask"], cost["total"]) == (["two"], ["one"], ["one", "two"])


@pytest.mark.parametrize(
    ("label", "other"),
    [
        ("perplexity, wiki", {"perplexity_convention": {"wiki": "windows of 512 tokens"}}),
        ("perplexity, wiki", {"perplexity": perplexity(22.0, 33.0)}),  # of another text or model of the same name
        ("perplexity, wiki", {"perplexity": perplexity(None, 33.0), "checkpoint": "another"}),
        ("error, held-out", {"calibration": {"samples": 64}}),
        ("error, calibration", {"checkpoint": "another"}),
        ("total", {"machine": {"cpu": "Another"}}),
        ("peak memory, host", {"machine": {"accelerator": None}}),
        ("total", {"machine": {"threads": 64}}),
    ],
)
def test_what_was_measured_otherwise_is_not_compared_and_said_so(label: str, other: dict[str, Any]) -> None:
    same = [a_run("one", perplexity=perplexity(20.0, 30.0)), a_run("two", perplexity=perplexity(20.0, 31.0))]
    odd = a_run("odd", **({"perplexity": perplexity(20.0, 3.0)} | other))
    for runs in ([*same, odd], [odd, *same]):
        found = next(t for t in tables(runs) if any(column.label == label for column in t.columns))
        cells = {
            row[0]: cell
            for column in found.columns
            if column.label == label
            for row, cell in zip(found.rows, column.cells, strict=True)
            if cell.measured and row[0] != "dense"
        }
        assert not cells["odd"].best
        assert cells["one"].best
        assert cells["one"].mark == cells["two"].mark != cells["odd"].mark
        notes = " ".join(found.notes)
        assert "not all measured alike" in notes
        for cell in cells.values():
            assert f"{cell.mark}: {cell.basis}." in notes


def test_a_machine_has_one_letter_in_all_columns() -> None:
    seconds = {"load": 1.0, "mask": None, "reconstruct": None, "total": 1.0}
    runs = [a_run("one", seconds=seconds), a_run("two", machine={"threads": 4}), a_run("three", machine={"threads": 8})]
    found = table(runs, "cost")
    marks = {column.label: [cell.mark for cell in column.cells] for column in found.columns}
    assert marks["load"] == marks["total"] == ["a", "b", "c"]
    assert marks["mask"] == ["", "b", "c"]
    assert [note[:2] for note in found.notes if note[1] == ":"] == ["a:", "b:", "c:"]


def test_nothing_is_best_without_a_rival() -> None:
    odd = a_run("odd", machine={"threads": 64}, calibration={"samples": 1}, perplexity=perplexity(99.0, 100.0))
    for found in tables([a_run("one"), odd]):
        assert not any(cell.best for column in found.columns for cell in column.cells)


def test_machines_that_were_not_recorded_are_no_rivals() -> None:
    runs = [a_run("one"), a_run("two")]
    for run in runs:
        del run.metrics["machine"]  # type: ignore[attr-defined]
    assert not any(best(runs, "cost").values())


def test_less_sparsity_does_not_win_against_more() -> None:
    runs = [
        a_run("half", perplexity=perplexity(20.0, 30.0)),
        a_run("two of four", perplexity=perplexity(20.0, 31.0), method={"sparsity": "2:4"}),
        a_run("more", perplexity=perplexity(20.0, 50.0), method={"sparsity": "0.7"}),
        a_run("more too", perplexity=perplexity(20.0, 40.0), method={"sparsity": "0.70"}),
    ]
    assert best(runs, "quality")["perplexity, wiki"] == ["half", "more too"]
    assert "at the same sparsity asked for" in reading_aid(runs)[0]
    assert best([runs[0], runs[2]], "quality")["perplexity, wiki"] == ["half"]
    assert "sparsity asked for" not in reading_aid([runs[0], runs[2]])[0]


def test_zero_shot_on_other_samples_is_not_compared() -> None:
    other = copy.deepcopy(EVALUATION)
    other["zero_shot"]["tasks"]["rte"] |= {"samples": 277, "pruned": {"value": 0.9, "stderr": 0.01}}
    runs = [a_run("one", EVALUATION), a_run("two", other)]
    assert best(runs, "zero_shot") == {"rte": [], "boolq": ["one", "two"], "mean": []}
    assert [row for row, *_ in table(runs, "zero_shot").rows] == ["dense", "dense", "one", "two"]


def evaluated(**changes: Any) -> dict[str, Any]:
    """An evaluation in which some of a text's figures, or of a task's, are others."""
    other = copy.deepcopy(EVALUATION)
    other["dense"] = changes.pop("dense_model", other["dense"])
    for task in other["zero_shot"]["tasks"].values():
        task["convention"] = changes.get("asked", task["convention"])
    other["perplexity"]["wiki"] |= {"tokens_sha256": changes.get("tokens", "aa11"), "dense": changes.get("dense", 19.0)}
    return other


@pytest.mark.parametrize(
    ("place", "columns", "odd"),
    [
        ("divergence", ["KL, wiki", "top-1 agreement, wiki"], {"dense_model": "org/another"}),
        ("divergence", ["KL, wiki", "top-1 agreement, wiki"], {"tokens": "bb22"}),
        ("quality", ["perplexity, wiki"], {"tokens": "bb22"}),
        ("quality", ["perplexity, wiki"], {"tokens": "bb22", "dense": None}),
        ("quality", ["perplexity, wiki"], {"dense_model": "org/another", "dense": 30.0}),
        ("zero_shot", ["rte", "boolq", "mean"], {"asked": "lm-eval 9, its own data set"}),
    ],
)
def test_what_was_evaluated_otherwise_is_not_compared(place: str, columns: list[str], odd: dict[str, Any]) -> None:
    """Against another dense model, on another text of the same name, on questions from elsewhere."""
    runs = [a_run("one", evaluated()), a_run("two", evaluated()), a_run("odd", evaluated(**odd))]
    found = table(runs, place)
    for column in [column for column in found.columns if column.label in columns][-len(columns) :]:
        one, two, last = column.cells[-3:]
        assert (one.best, two.best, last.best) == (True, True, False), column.label
        assert one.mark == two.mark != last.mark
        told = {note[2:] for note in found.notes if note[:2] in (f"{one.mark}:", f"{last.mark}:")}
        assert len(told) == 2, "a reader can tell them apart"


def test_a_dense_model_that_is_not_the_runs_own_is_named() -> None:
    run = a_run("one", evaluated(dense_model="org/another"))
    assert table([run], "zero_shot").rows[0] == ("dense", "org/another")
    assert [row for row in table([run], "quality").rows if row[0] == "dense"] == [
        ("dense", "org/tiny-model"),
        ("dense", "org/another"),
    ]
    assert table([a_run("one", evaluated())], "zero_shot").rows[0] == ("dense", "")


def test_a_metric_other_than_accuracy_is_no_percentage_and_has_no_best() -> None:
    runs = []
    for label, value in (("one", 23.5), ("two", 99.1)):
        other = copy.deepcopy(EVALUATION)
        other["zero_shot"]["tasks"]["rte"] |= {
            "metric": "word_perplexity",
            "dense": {"value": 15.25, "stderr": None},
            "pruned": {"value": value, "stderr": 0.5},
        }
        runs.append(a_run(label, other))
    found = table(runs, "zero_shot")
    shown = {column.label: [cell.shown for cell in column.cells] for column in found.columns}
    assert shown["rte (word_perplexity)"] == ["15.2", "23.5 ± 0.50", "99.1 ± 0.50"]
    assert best(runs, "zero_shot") == {"rte (word_perplexity)": [], "boolq": ["one", "two"], "mean": ["one", "two"]}
    assert shown["boolq"] == ["50.0 ± 7.1%", "48.0 ± 7.0%", "48.0 ± 7.0%"]


def test_a_run_without_an_evaluation_has_no_row_among_those_that_have_one() -> None:
    runs = [a_run("one", EVALUATION), a_run("two")]
    assert [row for row, *_ in table(runs, "zero_shot").rows] == ["dense", "one"]
    assert {table.name for table in tables([a_run("two")])} == {"quality", "cost"}


def test_comma_separated_figures_are_exact() -> None:
    runs = [a_run('one, "quoted"', perplexity=perplexity(20.0, 30.123456789012345)), a_run("two")]
    rows = list(csv.DictReader(io.StringIO(comma_separated(table(runs, "quality")))))
    assert [row["run"] for row in rows] == ["dense", 'one, "quoted"', "two"] or len(rows) == 4
    first = next(row for row in rows if row["run"].startswith("one"))
    assert float(first["perplexity, wiki"]) == 30.123456789012345
    assert first["perplexity, wiki: convention"] == "org/tiny-model, wiki (dense: 20.00): windows of 256 tokens"
    for row, run in zip(rows[-2:], runs, strict=True):
        assert float(row["error, calibration"]) == run.metrics["blocks"][-1]["error"]["after"]


def test_markdown_and_latex_are_regular_whatever_names_hold() -> None:
    runs = [a_run("a|b_c*d"), a_run(r"50% & {x}\y #1 $z^2~")]
    found, remarks = tables(runs), reading_aid(runs)
    lines = [line for line in markdown(found, remarks).splitlines() if line.startswith("|")]
    for first, second in pairwise(lines):
        if not second.startswith("| run"):
            assert len(re.findall(r"(?<!\\)\|", first)) == len(re.findall(r"(?<!\\)\|", second))
    source = latex(found, remarks)
    bare = re.sub(r"\\[&%$#_{}]", "", source.replace(r"\\", ""))
    assert bare.count("{") == bare.count("}")
    assert source.count(r"\toprule") == source.count(r"\bottomrule") == len(found)
    for body in re.findall(r"\\toprule\n(.*?)\\bottomrule", source, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    text = re.sub(r"\\usepackage\{booktabs\}", "", source)
    assert not re.search(r"(?<!\\)[#~^_]", text.replace("\\label{tab:zero_shot}", ""))
    rivals = [a_run("x", perplexity=perplexity(20.0, 30.0)), a_run("y", perplexity=perplexity(20.0, 31.0))]
    assert r"& \textbf{30.00} &" in latex(tables(rivals), [])
    assert "| **30.00** |" in markdown(tables(rivals), [])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [FinishedRun(tmp_path / place, {}, "") for place in ("a/run", "b/run", "c")]
    assert [run.label for run in name_runs(runs)] == ["a/run", "b/run", "c"]


def test_only_settings_that_differ_are_listed() -> None:
    runs = [a_run("one"), a_run("two", settings={"sparsity": "0.7", "mask": {"class_path": "lit_prune.masks.ALPS"}})]
    assert differences(runs) == {"model.sparsity": ["0.5", "0.7"], "model.mask.class_path": ["x.Wanda", "ALPS"]}
    assert differences(runs[:1]) == {}


def test_one_line_a_run_on_both_texts_and_one_look() -> None:
    runs = [a_run(f"run {index}") for index in range(9)]
    for index, run in enumerate(runs):
        for entry in run.metrics["blocks"]:
            entry["error"]["after"] *= index + 1
    drawn = looks(runs)
    assert len(set(drawn.values())) == len(runs)
    figure = errors_figure(runs, drawn)
    assert figure is not None
    for axes, key in zip(figure.axes, ("error", "validation_error"), strict=True):
        lines = axes.lines[: len(runs)]
        for line, run in zip(lines, runs, strict=True):
            assert np.asarray(line.get_ydata()).tolist() == [b[key]["after"] for b in run.metrics["blocks"]]
            assert line.get_color() == drawn[run.label].color
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [run.label for run in runs]


def test_a_line_joins_runs_that_differ_in_sparsity_alone() -> None:
    runs = [
        a_run("a", {}, {"sparsity": "0.7"}, perplexity=perplexity(20.0, 50.0), sparsity=0.7),
        a_run("b", {}, {"sparsity": "0.5"}, perplexity=perplexity(20.0, 30.0), sparsity=0.5),
        a_run("c", {}, {"sparsity": "0.6", "mask": "other"}, perplexity=perplexity(20.0, 35.0), sparsity=0.6),
        a_run("d", {}, {"sparsity": "2:4"}, perplexity=perplexity(20.0, 45.0), sparsity=0.5),
    ]
    figure = perplexity_figure(runs, "wiki", runs[0].perplexities[0][2], looks(runs))
    assert figure is not None
    lines = [np.column_stack(line.get_data()).tolist() for line in figure.axes[0].lines]
    assert lines[0] == [[0.5, 30.0], [0.7, 50.0]]
    assert lines[1:5] == [[[0.7, 50.0]], [[0.5, 30.0]], [[0.6, 35.0]], [[0.5, 45.0]]]
    assert lines[5][0][1] == 20.0, "the dense model"


def folder_of(run: Compared, folder: Path, finished: bool = True) -> Path:
    """The files of a run that a report reads."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"finished": finished}))
    (folder / "metrics.json").write_text(json.dumps(run.metrics))
    (folder / "config.yaml").write_text(run.run.config)
    if run.run.evaluation:
        (folder / "evaluation.json").write_text(json.dumps(run.run.evaluation))
    return folder


def report(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_the_folder_holds_page_tables_and_plots(tmp_path: Path) -> None:
    blocks = finished_run()["blocks"][:2]
    hostile = "<script>$_x&"
    one = folder_of(a_run("one", EVALUATION, blocks=blocks, trainings=[]), tmp_path / hostile)
    two = folder_of(a_run("two", blocks=blocks, trainings=[]), tmp_path / "_two")
    out = tmp_path / "deep" / "comparison"
    assert report(one, two, "--output", out) == 0
    assert {path.name for path in out.iterdir()} == {
        *("report.html", "tables.md", "tables.tex", "plots"),
        *("quality.csv", "zero_shot.csv", "divergence.csv", "cost.csv"),
    }
    assert [path.name for path in out.parent.iterdir()] == ["comparison"]
    plots = {path.stem for path in (out / "plots").iterdir()}
    assert plots == {"errors", "perplexity_wiki_1", "perplexity_books", "stages"}
    for name in plots:
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(out / "plots" / f"{name}.svg").getroot().tag.endswith("svg")
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "<script" not in page.source
    assert hostile in page.texts["quality"]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "image"}
    assert not any(reference in page.source for reference in ("http:", "https:", "@import"))
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    labels = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", page.source)]
    assert {"_two", "&lt;script&gt;$_x&amp;"} <= set(labels), "legends show names as they are"
    for convention in finished_run()["perplexity_convention"].values():
        assert convention in page.texts["quality"]
    assert len([1 for tag, _ in page.tags if tag == "figcaption"]) == len(plots)


def test_plots_of_labels_alike_in_file_names_are_kept_apart(tmp_path: Path) -> None:
    labels = ("w 0.5", "w_0.5", "w_0.5_2", "W_0.5")
    layers = {"attention.out": {"weights": 10, "zeros": 5}}
    blocks = [{**block, "layers": layers} for block in finished_run()["blocks"][:2]]
    runs = [
        folder_of(a_run(label, blocks=blocks, trainings=[]), tmp_path / str(place) / label)
        for place, label in enumerate(labels)
    ]
    assert report(*runs, "--output", tmp_path / "out") == 0
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    names = {path.name.casefold() for path in (tmp_path / "out" / "plots").glob("sparsity_*.png")}
    assert len(names) == len(labels)


def test_refusals_come_in_a_sentence_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder_of(a_run("run"), tmp_path / "run")
    unfinished = folder_of(a_run("run"), tmp_path / "unfinished", finished=False)
    broken = folder_of(a_run("run"), tmp_path / "broken")
    (broken / "evaluation.json").write_text("{")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    new = tmp_path / "new"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for arguments, said in (
        ((run, "--output", full), f"output: '{full}' is not empty; give a new folder."),
        ((run, "--output", "."), "output: '.' is where the command was given; give a new folder."),
        ((run, "--output", full / "mine"), "is a file; give a new folder."),
        ((run, "--output", full / "mine" / "x"), "mine' is a file; give a new folder."),
        ((run, tmp_path, "--output", new), f"runs: '{tmp_path}' holds no run; give the output_dir of a finished"),
        ((run, unfinished, "--output", new), "is not finished; `lit-prune fit --config"),
        ((broken, "--output", new), "evaluation.json' cannot be read"),
        ((run, run.parent / "full" / ".." / "run", "--output", new), "is given 2 times; give every run once."),
        ((run,), "These settings are missing: output; see lit-prune report --help."),
        (("--output", new), "These settings are missing: runs; see lit-prune report --help."),
        ((run, "--output", new, "--formt", "x"), "There is no setting 'formt'"),
    ):
        assert report(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not new.exists()
    assert [path.name for path in full.iterdir()] == ["mine"]
