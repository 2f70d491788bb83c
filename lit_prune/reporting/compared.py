"""Runs that are to be compared, and what each of their figures was measured on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from lit_prune.finished import FinishedRun
from lit_prune.reporting import wording
from lit_prune.reporting.cells import Basis
from lit_prune.reporting.reading import section


@dataclass(frozen=True)
class Compared:
    """A run under the name that it goes by in the comparison."""

    label: str
    run: FinishedRun

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Its figures."""
        return self.run.metrics

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """What `lit-prune evaluate` found; empty where it was not asked."""
        return self.run.evaluation or {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted key, without the folder."""
        flat = _flat(yaml.safe_load(self.run.config) or {})
        flat.pop("output_dir", None)
        return flat

    @property
    def checkpoint(self) -> str:
        """The dense model's short name."""
        return wording.short_name(self.metrics.get("checkpoint"))

    @property
    def reference(self) -> str:
        """The short name of the dense model that `lit-prune evaluate` measured beside it, which may be another."""
        return wording.short_name(self.evaluation.get("dense") or self.metrics.get("checkpoint"))

    @property
    def text(self) -> Basis:
        """On what the errors of its blocks were measured."""
        calibration = section(self.metrics, "calibration")
        seed = self.settings.get("data.seed")
        seed = self.settings.get("seed_everything") if seed is None else seed
        words = (
            f"{calibration.get('samples')} calibration and {calibration.get('validation_samples')} held-out samples "
            f"of {calibration.get('sequence_length')} tokens of {wording.short_name(calibration.get('source'))}, "
            f"seed {seed}"
        )
        if calibration.get("self_generated"):
            words += f", and {calibration.get('self_generated_samples')} self-generated samples"
        return Basis(words, self.checkpoint)

    @property
    def perplexities(self) -> list[tuple[str, float | None, Basis]]:
        """Text, figure and basis, of the run itself, and of `evaluate` where it measured otherwise."""
        conventions, measured = (section(self.metrics, key) for key in ("perplexity_convention", "perplexity"))
        found = []
        for text, convention in conventions.items():
            dense, pruned = ((measured.get(stage) or {}).get(text) for stage in ("dense", "pruned"))
            basis = Basis(str(convention), f"{self.checkpoint}, {text}", dense, model=self.checkpoint)
            found.append((text, pruned, basis))
        for text, figures in section(self.evaluation, "perplexity").items():
            basis = Basis(
                str(figures["convention"]),
                f"{self.reference}, {text}",
                figures.get("dense"),
                figures.get("tokens_sha256", ""),
                self.reference,
            )
            if not any(text == known and basis.words == other.words for known, _, other in found):
                found.append((text, figures.get("pruned"), basis))
        return found

    @property
    def machine(self) -> Basis:
        """What its seconds and bytes depend on."""
        words = wording.machine(section(self.metrics, "machine"))
        if not words:
            return Basis("a machine that was not recorded", f"{self.checkpoint}, {self.label}")
        return Basis(words, self.checkpoint)


def name_runs(runs: Sequence[FinishedRun]) -> list[Compared]:
    """Give every run its folder's name, and as much of the path before it as tells it from the others."""
    paths = [run.path.resolve().parts for run in runs]
    labels = []
    for path in paths:
        length = 1
        while length < len(path) and sum(other[-length:] == path[-length:] for other in paths) > 1:
            length += 1
        labels.append("/".join(path[-length:]))
    return [Compared(label, run) for label, run in zip(labels, runs, strict=True)]


def groups(runs: Sequence[Compared], bases: Sequence[Basis | None]) -> list[tuple[Basis, list[Compared]]]:
    """The runs of each basis, in their order; runs without any are left out."""
    found: list[tuple[Basis, list[Compared]]] = []
    for run, basis in zip(runs, bases, strict=True):
        if basis is None:
            continue
        members = next((members for other, members in found if other.same(basis)), None)
        if members is None:
            found.append((basis, [run]))
        else:
            members.append(run)
    return found


def differences(runs: Sequence[Compared]) -> dict[str, list[str]]:
    """The settings in which runs differ: a value for every run, empty where it has no such setting."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [_plain(run.settings.get(key, "")) for run in runs] for key in keys}
    return {key: given for key, given in values.items() if len(set(given)) > 1}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> str:
    """A setting's value as a reader writes it: a class without its module."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = "none" if value is None else wording.short_name(value)
    return text.rsplit(".", 1)[-1] if text.startswith(("lit_prune.", "torch.", "lightning.")) else text
