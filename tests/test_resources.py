"""The stopwatch against a clock that the test sets."""

import sys
from pathlib import Path

import pytest
import torch

from lit_prune.resources import Stopwatch, machine, peak_memory_bytes


def test_stopwatch_counts_each_stage_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Stopwatch({"mask": 5.0, "save": None})
    with clock("total"):
        for _ in range(2):
            with clock("mask"):
                now[0] += 3
        assert clock.seconds == {"mask": 11.0, "total": 6.0}
        with clock("save"):
            now[0] += 1
    now[0] += 50
    assert clock.seconds == {"mask": 11.0, "total": 7.0, "save": 1.0}


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_bytes()["host"]
    held = b"x" * 300_000_000
    after = peak_memory_bytes()
    assert after["host"] >= max(before, len(held))
    assert after["device"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_every_stage_has_the_peak_of_its_own_time():
    clock = Stopwatch(None, {"mask": {"host": 1, "device": None}, "load": {"host": 10**15, "device": None}})
    with clock("total"):
        with clock("save"):
            held = b"x" * 400_000_000
        with clock("mask"):
            del held
        with clock("load"):
            pass
        with clock("advance"):
            pass
    peaks = {stage: peak["host"] for stage, peak in clock.peaks.items()}
    assert peaks["load"] == 10**15, "that of an earlier process"
    assert peaks["total"] == max(peaks["save"], peaks["mask"])
    assert peaks["save"] - peaks["advance"] > 350_000_000
    assert peaks["mask"] > 350_000_000, "it began with what was held"


def test_where_no_peak_is_forgotten_stages_have_none(monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    clock = Stopwatch()
    with clock("total"), clock("mask"):
        pass
    assert clock.peaks == {stage: {"host": None, "device": None} for stage in ("total", "mask")}


def test_the_machine_is_named():
    found = machine(torch.device("cpu"))
    assert (found["threads"], found["accelerator"]) == (torch.get_num_threads(), None)
    assert len(found["cpu"]) > 2
    assert machine(torch.device("meta"))["accelerator"] == "meta"
