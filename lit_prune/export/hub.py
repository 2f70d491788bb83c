"""A folder onto a model hub, under a name that is free. The token is the environment's or the hub's own login."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from lit_prune import __version__
from lit_prune.errors import BadInput
from lit_prune.models.checkpoint import reading

KEY = "push_to_hub"


def free_name(name: str) -> str:
    """A repository's whole name, with the user's own where none is given.

    Raises:
        BadInput: it is no name, there is no token, the hub cannot be reached, or the repository holds something.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(f"{KEY}: '{name}' is no repository's name ({error}); give NAME or OWNER/NAME.") from error
    if not get_token():
        raise BadInput(f"{KEY}: there is no token for the hub; set HF_TOKEN, or log in with: hf auth login")
    api = HfApi()
    with reading(lambda reason: f"{KEY}: the hub cannot be asked about '{name}' ({reason}); export without it."):
        whole = name if "/" in name else f"{api.whoami()['name']}/{name}"
        held = {*api.list_repo_files(whole)} - {".gitattributes"} if api.repo_exists(whole) else set()
    if held:
        raise BadInput(f"{KEY}: '{whole}' holds {len(held)} files already; give another name.")
    return whole


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder and say where it is.

    Args:
        folder: the folder.
        name: as `free_name` gives it.
        private: whether only the owner may see it.

    Raises:
        BadInput: the hub refuses it or cannot be reached; the folder stays.
    """
    with reading(
        lambda reason: (
            f"{KEY}: '{folder}' is whole, but could not be uploaded ({reason}); to try again: hf upload {name} {folder}"
        )
    ):
        api = HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload by lit-prune {__version__}")
    return str(url)
