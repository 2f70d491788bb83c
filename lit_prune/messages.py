"""What a command says: our own lines are shown; what the libraries say to each of dozens of passes would bury them."""

import logging
import warnings


def set_up_messages() -> None:
    """Let our own lines through, and keep the libraries' chatter away."""
    from transformers.utils.logging import disable_progress_bar

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("lit_prune").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    for chatter in (
        r".*does not have many workers",  # the data lie in memory already
        r".*module\(s\) in eval mode",  # dropout stays off: the dense model's outputs had none
        r".*LeafSpec.*deprecated",
    ):
        warnings.filterwarnings("ignore", chatter)
