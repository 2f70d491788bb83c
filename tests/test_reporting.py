"""The report page and the closing table show the metrics' own figures, whatever is missing, zero or hostile."""

import copy
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from lit_prune.reporting import summary_table, wording, write_report
from lit_prune.reporting.heat_map import heat_limits, sparsity_figure
from lit_prune.reporting.plots import error_figure, loss_figure, stages_figure
from lit_prune.reporting.reading import layer_sparsities, spikes
from lit_prune.reporting.style import DARK, LIGHT, inline_svg

CONFIG = "model:\n  checkpoint: tiny  # <b>&amp;\n"
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """What a page shows: text and `<data>` values by the id of the section around them, and tables by section."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[tuple[str, str | None]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.values: dict[str, list[float]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.best: dict[str, list[str]] = {}
        self.feed(source)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag in VOID:
            return
        self.open.append((tag, attributes.get("id")))
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1].append("")
        elif tag == "data":
            self.values.setdefault(self.section, []).append(float(attributes["value"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for _, identity in self.open:
            if identity:
                self.texts[identity] = self.texts.get(identity, "") + data
        tags = [tag for tag, _ in self.open]
        name = next((tag for tag in ("title", "h1", "pre", "style") if tag in tags), "")
        self.texts[name] = self.texts.get(name, "") + data
        if "strong" in tags and data.strip():
            self.best.setdefault(self.section, []).append(data.strip())
        if "td" in tags or "th" in tags:
            self.tables[self.section][-1][-1] += data.strip()

    @property
    def section(self) -> str:
        """The id of the innermost section."""
        return next((identity for tag, identity in reversed(self.open) if tag == "section" and identity), "")

    def row(self, section: str, label: str) -> list[str]:
        """The cells of a table's row, by its first cell."""
        return next(row[1:] for row in self.tables[section] if row[0] == label)


def block(index: int, error: float | None) -> dict[str, Any]:
    """A block whose four errors all differ and are multiples of `error`."""
    before, held_out, held_out_after = (None if error is None else factor * error for factor in (3.0, 3.5, 2.0))
    return {
        "index": index,
        "sparsity": 0.5,
        "error": {"before": before, "after": error},
        "validation_error": {"before": held_out, "after": held_out_after},
        "seconds": 9.125,
    }


def training(entry: dict[str, Any], best_epoch: int | None = 2) -> dict[str, Any]:
    """The training of such a block by itself."""
    (before, error), (held_out, held_out_after) = entry["error"].values(), entry["validation_error"].values()
    return {
        "name": f"block_{entry['index']:02d}",
        "round": entry["index"],
        "blocks": [entry["index"]],
        "part": None,
        "loss": {"train": [before, error], "held_out": [held_out, held_out, held_out_after]},
        "best_epoch": best_epoch,
    }


def finished_run() -> dict[str, Any]:
    """A run of eight blocks without a spike, the fourth of which kept its start."""
    blocks = [block(index, 0.0123 * (index + 1)) for index in range(8)]
    return {
        "checkpoint": "org/tiny-model",
        "method": {"mask": "Wanda", "reconstruction": "block", "global_propagation": True, "sparsity": "0.5"},
        "calibration": {"source": "c4", "samples": 32, "validation_samples": 8, "sequence_length": 256},
        "sparsity": 0.4987,
        "blocks": blocks,
        "trainings": [training(entry, 0 if entry["index"] == 3 else 2) for entry in blocks],
        "error": blocks[-1]["error"]["after"],
        "seconds": {"load": 3.25, "mask": 0.021, "reconstruct": 282.0, "total": 3725.0},
        "peak_memory_bytes": {
            "host": 2_345_678_901,
            "device": None,
            "by_stage": {"mask": {"host": 1_500_000_000, "device": None}},
        },
        "machine": {"cpu": "A processor", "threads": 2, "accelerator": "A card"},
        "perplexity": {
            "dense": {"wiki": 20.456, "books": 31.0},
            "masked": {"wiki": 60.123, "books": None},
            "pruned": {"wiki": 33.219, "books": 1234567.0},
        },
        "perplexity_convention": {"wiki": "windows of 256 tokens", "books": "one window a book"},
        "versions": {"lit_prune": "0.1.0", "torch": "2.13.0"},
    }


@pytest.fixture
def metrics() -> dict[str, Any]:
    """A finished run, to be altered at will."""
    return finished_run()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the finished run as it is; drawing it takes most of a second."""
    return render(finished_run(), tmp_path_factory.mktemp("run"))


def unreconstructed(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same run without reconstruction, as such a run's metrics are."""
    metrics = copy.deepcopy(metrics)
    metrics["method"]["reconstruction"] = "none"
    metrics["perplexity"]["masked"] = metrics["perplexity"]["pruned"]
    for entry in metrics["blocks"]:
        for key in ("error", "validation_error"):
            entry[key]["after"] = entry[key]["before"]
    metrics["trainings"] = []
    return metrics


def render(metrics: dict[str, Any], folder: Path) -> Page:
    """Write the report and read it back."""
    json.dumps(metrics, allow_nan=False)  # what a test invents has to be possible
    path = folder / "report.html"
    write_report(metrics, CONFIG, path)
    return Page(path.read_text(encoding="utf-8"))


def drawn(figure: Figure | None) -> Figure:
    """A figure, where there has to be one."""
    assert figure is not None
    return figure


def table_lines(metrics: dict[str, Any]) -> list[str]:
    """The closing table on a terminal of 80 columns."""
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(summary_table(metrics))
    return capture.get().splitlines()


def test_page_shows_the_figures_of_the_metrics(metrics: dict[str, Any], page: Page) -> None:
    last = metrics["blocks"][-1]

    assert page.texts["h1"] == "org/tiny-model"
    assert "50% of the weights removed by Wanda, then reconstructed block by block" in page.source
    assert page.tables["result"][0] == ["", "dense", "masked only", "reconstructed"]
    assert page.row("result", "perplexity, wiki") == ["20.46", "60.12", "33.22"]
    assert page.row("result", "perplexity, books") == ["31.00", "not measured", "1.23e+06"]
    assert page.row("result", "last block's error, calibration") == ["-", "0.295*", "0.0984"]
    assert page.row("result", "last block's error, held-out") == ["-", "0.344*", "0.197"]
    assert page.row("result", "sparsity") == ["-", "49.87%", "49.87%"]
    assert page.values["result"] == [
        *(20.456, 60.123, 33.219, 31.0, 1234567.0),
        *(last["error"]["before"], last["error"]["after"]),
        *(last["validation_error"]["before"], last["validation_error"]["after"]),
        *(0.4987, 0.4987),
    ]
    for convention in metrics["perplexity_convention"].values():
        assert convention in page.texts["result"]


def test_table_of_blocks_is_exact(metrics: dict[str, Any], page: Page) -> None:
    expected = [
        figure
        for entry in metrics["blocks"]
        for figure in (
            entry["sparsity"],
            *(entry[key][moment] for key in ("error", "validation_error") for moment in ("before", "after")),
            0 if entry["index"] == 3 else 2,
            entry["seconds"],
        )
    ]
    assert page.values["blocks"] == expected
    assert [row[0] for row in page.tables["blocks"][2:]] == [str(entry["index"]) for entry in metrics["blocks"]]
    assert page.row("blocks", "3")[-2] == "start"
    assert page.row("blocks", "2")[-2] == "2"


def test_time_memory_versions_and_configuration(metrics: dict[str, Any], page: Page) -> None:
    assert page.tables["stages"] == [
        ["", "time", "peak, host", "peak, device"],
        ["load", "3.2 s", "not measured", "not measured"],
        ["mask", "0.021 s", "1.50 GB", "not measured"],
        ["reconstruct", "4 min 42 s", "not measured", "not measured"],
        ["total", "1 h 02 min", "2.35 GB", "not measured"],
    ]
    assert page.values["stages"] == [3.25, 0.021, 1_500_000_000, 282.0, 3725.0, 2_345_678_901]
    assert "on A processor (2 threads) and A card" in page.texts["stages"]
    assert page.tables["versions"] == [["lit_prune", "0.1.0"], ["torch", "2.13.0"]]
    assert page.texts["pre"] == CONFIG


def test_null_is_never_shown_as_a_figure(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {
        "checkpoint": "tiny",
        "method": {"mask": "Wanda", "reconstruction": "block", "global_propagation": None, "sparsity": None},
        "calibration": None,
        "sparsity": None,
        "blocks": [block(0, None) | {"sparsity": None, "seconds": None}],
        "error": None,
        "seconds": {"load": None, "total": None},
        "peak_memory_bytes": {"host": None, "device": None},
        "perplexity": {"dense": {"wiki": None}, "masked": None, "pruned": None},
        "perplexity_convention": None,
        "versions": {"torch": None},
    }
    page = render(nothing, tmp_path)
    assert page.values == {}
    assert page.row("result", "perplexity, wiki") == ["not measured"] * 3
    assert page.row("blocks", "0") == ["not measured"] * 7
    assert page.row("stages", "total") == ["not measured"] * 3
    assert not any(tag == "svg" for tag, _ in page.tags)
    assert "cannot be judged" in page.texts["verdict"]
    assert "None" not in page.source
    shown = "\n".join(table_lines(nothing))
    assert "Time in all: not measured. Peak memory: host not measured, device not" in shown
    assert "0" not in shown


@pytest.mark.parametrize("unfinished", [{}, {"blocks": []}, {"checkpoint": "tiny", "blocks": [{"index": 0}]}])
def test_an_unfinished_run_can_be_shown(unfinished: dict[str, Any], tmp_path: Path) -> None:
    page = render(unfinished, tmp_path)
    assert page.row("result", "perplexity")[0] == "not measured"
    assert "not measured" in "\n".join(table_lines(unfinished))


def test_zero_errors_leave_gaps_and_are_named(metrics: dict[str, Any], tmp_path: Path) -> None:
    for index in (0, 1, 2, 5):
        metrics["blocks"][index] = block(index, 0.0)
    metrics["trainings"] = []  # one plot less to draw
    page = render(metrics, tmp_path)
    assert "An error of exactly 0 (blocks 0 to 2 and 5) has no place on a logarithmic axis" in page.texts["plots"]
    assert page.row("blocks", "5")[1:5] == ["0"] * 4
    errors = np.asarray(drawn(error_figure(metrics)).axes[0].lines[0].get_ydata())
    assert np.isnan(errors).tolist() == [index in (0, 1, 2, 5) for index in range(8)]


def test_errors_of_zero_throughout_are_no_plot_but_a_sentence(metrics: dict[str, Any], tmp_path: Path) -> None:
    metrics["blocks"] = [block(index, 0.0) for index in range(3)]
    metrics["trainings"] = [training(entry) for entry in metrics["blocks"]]
    assert error_figure(metrics) is None
    assert loss_figure(metrics) is None
    page = render(metrics, tmp_path)
    assert [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"] == [
        "Time and peak memory of every stage"
    ]
    assert page.texts["verdict"].startswith("No overfitting: the last block's error is exactly 0")
    assert "blocks 0 to 2" in page.texts["plots"]


def test_only_a_spike_brings_the_note_on_spikes(metrics: dict[str, Any], page: Page, tmp_path: Path) -> None:
    assert spikes(metrics) == []
    assert "massive activations" not in page.source
    assert ("tr", {"class": "spike"}) not in page.tags

    metrics["trainings"] = []  # one plot less to draw
    metrics["blocks"][4]["error"]["after"] = 290.0
    found = spikes(metrics)
    assert [(spike.block, spike.error) for spike in found] == [(4, 290.0)]
    assert found[0].neighbours == pytest.approx(0.0123 * 4.5 + 0.0123 / 2)  # of blocks 1, 2, 3, 5, 6, 7
    page = render(metrics, tmp_path)
    assert "Block 4 has an error of 290 on calibration text, the median" in page.texts["plots"]
    assert "massive activations" in page.texts["plots"]
    assert ("tr", {"class": "spike"}) in page.tags


def test_spikes_are_found_side_by_side_and_at_the_end_and_growth_is_none(metrics: dict[str, Any]) -> None:
    for index in (3, 4, 7):
        metrics["blocks"][index] = block(index, 50.0)
    assert [spike.block for spike in spikes(metrics)] == [3, 4, 7]
    metrics["blocks"] = [block(index, 10.0 ** (index / 3)) for index in range(12)]
    assert spikes(metrics) == []


def test_a_spike_of_the_masked_block_alone_says_so(metrics: dict[str, Any]) -> None:
    metrics["blocks"][4]["error"]["before"] = 290.0
    note = "Block 4 has an error of 290 on calibration text before reconstruction,"
    assert wording.spike_note(metrics).startswith(note)
    assert "before reconstruction" not in wording.spike_note(unreconstructed(metrics))


@pytest.mark.parametrize(
    ("held_out", "verdict"),
    [(1.1, "No sign of overfitting"), (1.5, "Some overfitting"), (4.0, "Strong overfitting"), (None, "Overfitting ca")],
)
def test_verdict_on_overfitting(metrics: dict[str, Any], held_out: float | None, verdict: str) -> None:
    last = metrics["blocks"][-1]
    last["validation_error"]["after"] = None if held_out is None else held_out * last["error"]["after"]
    sentence = wording.overfitting(metrics)
    assert sentence.startswith(verdict)
    if held_out is not None:
        assert f"{held_out:.2f} times that on calibration text" in sentence


def test_gain_tells_better_from_worse(metrics: dict[str, Any]) -> None:
    metrics["blocks"][-1]["error"] = {"before": 4.0, "after": 1.0}
    metrics["blocks"][-1]["validation_error"] = {"before": 5.0, "after": 6.0}
    assert wording.gain(metrics) == (
        "By its reconstruction, the error of block 7 fell from 4.00 to 1.00 on calibration text "
        "and rose from 5.00 to 6.00 on held-out text."
    )
    assert wording.gain(unreconstructed(metrics)) == ""


def test_a_run_says_that_it_was_true_sequential(metrics: dict[str, Any]) -> None:
    metrics = unreconstructed(metrics)
    for value, said in ((True, True), (False, False), (None, False)):  # None as before there was such a thing
        metrics["method"]["true_sequential"] = value
        assert ("each layer behind the pruned ones of its block" in wording.method_in_words(metrics)) is said
        assert wording.method_label(metrics).endswith(" + TS") is said
    del metrics["method"]["true_sequential"]
    assert not wording.method_label(metrics).endswith(" + TS")


def test_without_reconstruction_one_sparse_column_is_left(metrics: dict[str, Any], tmp_path: Path) -> None:
    metrics = unreconstructed(metrics)
    page = render(metrics, tmp_path)
    assert page.tables["result"][0] == ["", "dense", "masked only"]
    assert page.row("result", "last block's error, calibration") == ["-", "0.295"]
    assert page.texts["verdict"].startswith("Without reconstruction there is little to overfit")
    assert len(drawn(error_figure(metrics)).axes[0].lines) == 2
    assert loss_figure(metrics) is None
    assert not any(line.endswith("reconstructed  ") for line in table_lines(metrics))


def test_a_mask_that_updates_weights_keeps_its_column_without_reconstruction(
    metrics: dict[str, Any], tmp_path: Path
) -> None:
    metrics = unreconstructed(metrics)
    metrics["perplexity"]["masked"] = {"wiki": 60.0}
    metrics["blocks"] = []
    page = render(metrics, tmp_path)
    assert page.tables["result"][0] == ["", "dense", "masked only", "weights updated"]
    assert page.row("result", "perplexity, wiki") == ["20.46", "60.00", "33.22"]


def test_curves_hold_every_loss_at_its_epoch(metrics: dict[str, Any]) -> None:
    training, held_out = drawn(loss_figure(metrics)).axes[:2]
    assert training.get_yscale() == held_out.get_yscale() == "log"
    for panel, kind, epochs in ((training, "train", [1, 2]), (held_out, "held_out", [0, 1, 2])):
        assert len(panel.lines) == 8
        for line, entry in zip(panel.lines, metrics["trainings"], strict=True):
            assert np.asarray(line.get_xdata()).tolist() == epochs
            assert np.asarray(line.get_ydata()).tolist() == entry["loss"][kind]
    assert len({line.get_color() for line in training.lines}) == 8


def test_a_single_block_trained_for_one_epoch_can_be_drawn(metrics: dict[str, Any]) -> None:
    metrics["trainings"] = [training(block(0, 1.0), None) | {"loss": {"train": [1.0], "held_out": []}}]
    figure = drawn(loss_figure(metrics))
    assert figure.axes[0].lines[0].get_markevery() == [0]
    assert "<svg" in inline_svg(figure, "losses", "")


def test_plots_follow_the_theme_of_the_page(page: Page) -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)  # or one colour would take another's name
    for name in LIGHT:
        assert page.texts["style"].count(f"--{name}:") == 2, "one for light, one for dark"
    svgs = page.source[page.source.index("<svg") : page.source.rindex("</svg>")]
    for part in svgs.split("var(")[1:]:
        name, colour = part[: part.index(")")].split(", ")
        assert LIGHT[name.removeprefix("--")] == colour
    assert svgs.count("#") == sum(svgs.count(mark) for mark in (", #", 'href="#', "url(#"))


def test_page_needs_nothing_from_outside(page: Page) -> None:
    assert not any(reference in page.source for reference in ("http:", "https:", "@import"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image"}
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    references = [value for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    assert references
    assert all(reference and reference[0] == "#" and reference[1:] in identities for reference in references)


def test_names_from_outside_are_escaped(metrics: dict[str, Any], tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>"
    metrics["checkpoint"] = metrics["method"]["mask"] = metrics["calibration"]["source"] = hostile
    metrics["perplexity"]["dense"] = {hostile: 3.0}
    metrics["perplexity_convention"] = {hostile: hostile}
    metrics["versions"] = {hostile: hostile}
    metrics["seconds"][hostile] = 1.0
    metrics["blocks"] = []
    page = render(metrics, tmp_path)
    assert "<script" not in page.source
    assert page.texts["h1"] == hostile
    assert page.row("result", f"perplexity, {hostile}")[0] == "3.00"


def test_same_metrics_give_the_same_plot(metrics: dict[str, Any]) -> None:
    first, second = (inline_svg(drawn(error_figure(metrics)), "errors", "") for _ in range(2))
    assert first == second


def test_writing_leaves_no_stray_file_and_no_half_page(metrics: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    metrics["blocks"] = []
    write_report(metrics, CONFIG, path)
    first = path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]

    metrics["perplexity"]["dense"]["wiki"] = "no figure"
    with pytest.raises(TypeError, match=r"perplexity\.dense\.wiki"):
        write_report(metrics, CONFIG, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text(encoding="utf-8") == first


def test_a_failing_disk_leaves_the_earlier_page(
    metrics: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("earlier", encoding="utf-8")
    metrics["blocks"] = []

    def fail(source: object, target: object) -> None:
        assert Path(str(source)).is_relative_to(tmp_path), "a rename is atomic on one file system only"
        raise OSError("disk")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_report(metrics, CONFIG, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text(encoding="utf-8") == "earlier"


def test_closing_table_fits_80_columns(metrics: dict[str, Any]) -> None:
    metrics["checkpoint"] = "/a/" + "very/" * 30 + "long/path"
    metrics["perplexity"]["dense"]["a-text-with-a-name-of-more-than-thirty-letters"] = 7.0
    lines = table_lines(metrics)
    assert max(map(len, lines)) <= 80
    rows = {line[:34].strip(): line[34:].split() for line in lines}
    assert rows["perplexity, wiki"] == ["20.46", "60.12", "33.22"]
    assert rows["last block's error, calibration"] == ["-", "0.295*", "0.0984"]
    assert rows["last block's error, held-out"] == ["-", "0.344*", "0.197"]
    assert rows["sparsity"] == ["-", "49.87%", "49.87%"]
    shown = "\n".join(lines)
    assert "…" not in shown
    assert "Time in all: 1 h 02 min. Peak memory: host 2.35 GB, device not measured." in shown


def test_closing_table_takes_no_name_for_markup(metrics: dict[str, Any]) -> None:
    metrics["checkpoint"] = "[bold]tiny[/]"
    metrics["perplexity"]["dense"] = {"[red]text": 3.0}
    shown = "\n".join(table_lines(metrics))
    assert "[bold]tiny[/]: 50% of the weights" in shown
    assert "perplexity, [red]text" in shown


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        *((wording.number(None), "not measured"), (wording.number(0.0), "0"), (wording.number(math.inf), "not finite")),
        *((wording.number(290.4), "290"), (wording.number(1.236), "1.24"), (wording.number(12345.6), "12,346")),
        *((wording.number(0.000123), "0.000123"), (wording.number(1.2e-7), "1.20e-07")),
        *((wording.percent(0.5), "50%"), (wording.percent(1.0), "100%"), (wording.percent(None), "not measured")),
        *((wording.duration(0.0), "0 s"), (wording.duration(0.021), "0.021 s"), (wording.duration(59.94), "59.9 s")),
        *((wording.duration(59.96), "1 min 00 s"), (wording.duration(3599.7), "1 h 00 min")),
        *((wording.size(999), "0.000999 MB"), (wording.size(2.5e9), "2.50 GB"), (wording.size(None), "not measured")),
        (wording.sparsity_asked("2:4"), "2 of every 4 weights kept (2:4)"),
        (wording.sparsity_asked("0.625"), "62.5% of the weights removed"),
        (wording.which_blocks([0, 1, 2, 5, 7, 8]), "blocks 0 to 2, 5, 7 and 8"),
    ],
)
def test_figures_in_words(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_best_of_a_row_is_marked_where_there_is_a_choice(metrics: dict[str, Any], tmp_path: Path) -> None:
    metrics["blocks"], metrics["trainings"] = metrics["blocks"][-1:], []
    metrics["blocks"][0]["validation_error"] = {"before": 2.0, "after": 2.5}
    page = render(metrics, tmp_path)
    assert page.best["result"] == ["33.22", "0.0984", "2.00*"], "books was measured of one pruned model only"


def test_zeros_of_every_layer_become_a_heat_map(metrics: dict[str, Any]) -> None:
    assert layer_sparsities(metrics) == {}
    assert sparsity_figure(metrics) is None
    for entry in metrics["blocks"]:
        share = 10 * entry["index"]
        entry["layers"] = {
            "attention.out": {"weights": 100, "zeros": 0},
            "experts.0.up": {"weights": 100, "zeros": share},
            "experts.11.up": {"weights": 300, "zeros": share + 20},
        }
    del metrics["blocks"][2]["layers"]["attention.out"]
    shares = layer_sparsities(metrics)
    assert shares == {
        "attention.out": [0, 0, None, 0, 0, 0, 0, 0],
        "experts.*.up": [pytest.approx((20 * index + 20) / 400) for index in range(8)],
    }
    assert heat_limits([metrics]) == (0.05, 0.4)
    axes = drawn(sparsity_figure(metrics)).axes[0]
    dense, pruned = (np.ma.filled(mesh.get_array(), np.nan) for mesh in axes.collections)
    assert np.isnan(dense).tolist() == [[index == 2 for index in range(8)], [True] * 8]
    assert pruned[1].tolist() == shares["experts.*.up"]
    assert [text.get_text() for text in axes.texts][:8] == ["0"] * 7 + ["5.00"]


def test_bars_are_the_seconds_and_bytes_of_the_stages(metrics: dict[str, Any]) -> None:
    other = copy.deepcopy(metrics) | {"seconds": {"load": 1.0, "reconstruct": None, "mask": 2.0, "total": 3.0}}
    time, memory = drawn(stages_figure({"one": metrics, "$other_$": other})).axes
    heights = [[bar.get_height() for bar in bars] for bars in time.containers]
    assert heights == [[3.25, 0.021, 282.0], [1.0, 2.0, pytest.approx(math.nan, nan_ok=True)]]
    assert [label.get_text() for label in memory.get_xticklabels()] == ["load", "mask", "reconstruct"]
    assert [bar.get_height() for bar in memory.containers[0]][1] == pytest.approx(1.5)


EVALUATION: dict[str, Any] = {
    "model": "runs/tiny/model",
    "dense": "org/tiny-model",
    "perplexity": {"wiki": {"convention": "all windows of 512 tokens", "dense": 19.0, "pruned": 30.125}},
    "divergence": {"wiki": {"convention": "first 8 windows", "kl": 0.25, "top1_agreement": 0.75}},
    "zero_shot": {
        "limit": 50,
        "tasks": {
            task: {
                "convention": "lm-eval 9, the first 50 questions",
                "metric": "acc",
                "samples": 50,
                "dense": {"value": 0.5, "stderr": 0.071},
                "pruned": {"value": value, "stderr": 0.07},
            }
            for task, value in (("rte", 0.42), ("boolq", 0.48))
        },
        "mean": {"dense": 0.5, "pruned": 0.45},
    },
    "seconds": 1.0,
    "versions": {},
}


def test_an_evaluation_is_shown_beside_the_dense_model(metrics: dict[str, Any], tmp_path: Path) -> None:
    metrics["blocks"], metrics["trainings"] = [], []
    path = tmp_path / "report.html"
    write_report(metrics, CONFIG, path, EVALUATION)
    page = Page(path.read_text(encoding="utf-8"))
    rows = {row[0]: row[1:] for row in page.tables["result"] if row}
    assert rows["rte (acc)"] == ["50.0 ± 7.1%", "42.0 ± 7.0%"]
    assert rows["mean accuracy"] == ["50.0%", "45.0%"]
    assert rows["KL from the dense model, wiki"] == ["-", "0.250"]
    assert rows["top-1 agreement, wiki"] == ["-", "75%"]
    assert ["perplexity, wiki", "19.00", "30.12"] in page.tables["result"]
    for convention in ("all windows of 512 tokens", "first 8 windows", "the first 50 questions", "rte 50 and boolq 50"):
        assert convention in page.texts["result"]


def test_an_evaluation_of_perplexity_alone(metrics: dict[str, Any], tmp_path: Path) -> None:
    metrics["blocks"], metrics["trainings"] = [], []
    path = tmp_path / "report.html"
    write_report(metrics, CONFIG, path, EVALUATION | {"divergence": {}, "zero_shot": None})
    page = Page(path.read_text(encoding="utf-8"))
    assert ["perplexity, wiki", "19.00", "30.12"] in page.tables["result"]
    assert "KL" not in page.texts["result"]
    assert "lm-eval" not in page.texts["result"]
