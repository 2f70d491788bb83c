"""The stopwatch against a clock that the test sets."""

from lit_prune.resources import Stopwatch, peak_memory_bytes


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
