"""The verb `fit`: LightningCLI reads the settings, `run.Run` does the work."""

import copy
import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
)
from lightning.pytorch.loggers import Logger
from rich.console import Console

from lit_prune import ranks
from lit_prune.accelerators import in_precision, on_gaudi
from lit_prune.cli import VERBS, say
from lit_prune.complaints import OTHER_ENDED, out_of_range, sentence
from lit_prune.data import CalibrationText, EvaluationText
from lit_prune.errors import BadInput
from lit_prune.launch import joined
from lit_prune.masks import Allocation, MaskMethod, Sparsity, solvers
from lit_prune.messages import set_up_messages
from lit_prune.method import Pruning, Training
from lit_prune.modules.reconstruction import Decay
from lit_prune.reporting import summary_table
from lit_prune.run import Run
from lit_prune.run_folder import RunFolder

TRAINER_DEFAULTS: dict[str, Any] = {"max_epochs": 10, "log_every_n_steps": 1}
OPTIMIZER_DEFAULT = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 2e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "fused": True},
}


def _concrete(base: type) -> list[str]:
    """The names of a class's subclasses that can be chosen."""
    below: list[type] = base.__subclasses__()
    found: list[str] = []
    while below:
        child = below.pop()
        below += child.__subclasses__()
        found += [] if inspect.isabstract(child) else [child.__name__]
    return sorted(found)


CLASSES = {
    "model.mask": _concrete(MaskMethod),
    "model.solver": _concrete(solvers.Solver),
    "model.allocation": _concrete(Allocation),
}


class FitParser(LightningArgumentParser):
    """A parser that lets what another mask does not say be that mask's own default."""

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """The defaults; those of the default mask's arguments are left to be filled in when the mask is known.

        jsonargparse keeps arguments when a class takes another's place, so far as the new one has them: Magnitude
        would be chosen by rows, as Wanda is, and not over the whole matrix.
        """
        defaults = super().get_defaults(*args, **kwargs)
        if "model.mask" in defaults:
            defaults["model.mask"].pop("init_args", None)
        return defaults


class FitCLI(LightningCLI):
    """LightningCLI with the one verb `fit`, which is ours and not the Trainer's.

    The settings are `--model` (what is done), `--data`, `--evaluation`, `--trainer`, `--optimizer`,
    `--lr_scheduler`, `--seed_everything`, `--float32_matmul_precision` and `--output_dir`.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Of the Trainer's methods only fit, and none of its arguments."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The groups, with the paper's values as defaults."""
        parser.add_class_arguments(Pruning, "model")
        parser.add_class_arguments(CalibrationText, "data")
        parser.add_class_arguments(EvaluationText, "evaluation")
        parser.add_argument("--optimizer", type=OptimizerCallable, default=OPTIMIZER_DEFAULT, help="by class path")
        parser.add_argument(
            "--lr_scheduler",
            type=Decay | LRSchedulerCallable,
            default="linear",
            help="linear or cosine decay to zero over each block's training, constant, or a class path",
        )
        parser.add_argument(
            "--float32_matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="of forward passes: high allows TF32, medium bfloat16; as torch.set_float32_matmul_precision takes it",
        )
        parser.add_argument("--output_dir", type=str, required=True, help="the run's folder")
        parser.add_argument("--dry_run", action="store_true", help="only check everything, and say what it would need")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
        parser.set_defaults({"model.mask": {"class_path": "lit_prune.masks.Wanda"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and say what is wrong in one sentence.

        Raises:
            BadInput: a setting is unknown, missing, or not of its type.
        """
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]
        except ArgumentError as error:
            keys = self._subcommand_parsers["fit"].get_defaults().keys()
            raise BadInput(sentence(str(error), keys, CLASSES)) from error

    def instantiate_classes(self) -> None:
        """Only the parts that `fit` uses; Trainers are made as they are needed.

        Raises:
            BadInput: a class refuses a setting.
        """
        try:
            self.config_init = self.parser.instantiate(self.config)
        except ValueError as error:
            raise BadInput(out_of_range(error, dict(self.config.items()))) from error

    def _run_subcommand(self, subcommand: str) -> None:
        """LightningCLI would look for a model and a Trainer here, which this verb does not have yet."""
        self.fit()

    def fit(self) -> None:
        """Run, or say that the run is finished already, and close with a table of figures."""
        config, settings = self.config["fit"], self.config_init["fit"]
        if isinstance(settings["seed_everything"], bool):
            raise BadInput("seed_everything: 'false' does not fit; give a whole number, so that the run repeats.")
        path = Path(settings["output_dir"]).expanduser()
        torch.set_float32_matmul_precision(settings["float32_matmul_precision"])
        chosen = in_precision(on_gaudi(dict(settings["trainer"])))
        config["trainer"]["precision"] = chosen["precision"]
        trainer = partial(make_trainer, chosen)
        training = Training(trainer, settings["optimizer"], settings["lr_scheduler"], settings["seed_everything"])
        with joined(training, partial(say, f"{OTHER_ENDED}.")):
            folder = RunFolder(path, self._parser("fit").dump(_of_the_run(config), skip_unset=False))
            metrics = folder.metrics
            if folder.finished:
                say_first(f"The run in '{path}' is finished already; nothing was done.")
            else:
                run = Run(settings["model"], settings["data"], settings["evaluation"], training, folder)
                if settings["dry_run"]:
                    say_first(str(run.prepare().needs))
                    return
                metrics = run.fit()
            if ranks.rank() == 0:
                Console().print(summary_table(metrics))
                print(f"model   {path / 'model'}\nreport  {path / 'report.html'}")
                print(f"curves  tensorboard --logdir {path / 'tensorboard'}")


def say_first(line: str) -> None:
    """Print a line, once whatever the number of ranks."""
    if ranks.rank() == 0:
        print(line)


def make_trainer(settings: dict[str, Any], **overrides: Any) -> L.Trainer:
    """A fresh Trainer from the user's settings; a job's own callbacks and logger come beside the user's.

    Callbacks and loggers keep state, so every Trainer gets copies of the user's.
    """
    chosen = copy.deepcopy(settings)
    callbacks = [*(chosen.pop("callbacks", None) or []), *overrides.pop("callbacks", [])]
    loggers = chosen.pop("logger", None)
    own = overrides.pop("logger")
    if loggers is False:
        own = False
    elif own and isinstance(loggers, Logger | list):
        own = [own, *(loggers if isinstance(loggers, list) else [loggers])]
    return L.Trainer(**(chosen | overrides), callbacks=callbacks, logger=own)


def main(arguments: list[str]) -> None:
    """Parse and run `lit-prune fit ...`.

    Raises:
        BadInput: a setting is unknown, missing or cannot work.
    """
    register_type(Sparsity, str, Sparsity, fail_already_registered=False)
    set_parsing_settings(add_print_completion_argument=True)
    set_loader("yaml", partial(_load_yaml, get_loader("yaml")), exceptions=(yaml.YAMLError,))
    set_up_messages()
    parser_kwargs = {"prog": "lit-prune", "exit_on_error": False, "allow_abbrev": False}
    FitCLI(
        parser_class=FitParser,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs=parser_kwargs | {"fit": parser_kwargs | {"description": VERBS["fit"].summary}},
        args=arguments,
    )


def _load_yaml(load: Callable[[str], Any], text: str) -> Any:
    """Let `sparsity: 2:4` be what it looks like: YAML 1.1 alone reads it as the number 124, to base 60."""
    return load(re.sub(r"(?m)^([ \t]*[\w.]+:[ \t]+)(\d+:\d+)(?=[ \t]*(#.*)?$)", r"\1'\2'", text))


def _of_the_run(config: Namespace) -> Namespace:
    """What makes a run what it is: all settings but where they came from, and whether this was only a trial."""
    config = config.clone()
    for key in ("config", "dry_run"):
        config.pop(key, None)
    return config
