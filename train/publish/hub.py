"""Uploads a folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

TIMEOUT_S = 120.0
"""Longest that the hub may leave a connection silent."""


def push(folder: Path, repository: str, kind: Literal["model", "dataset"], private: bool) -> str:
    """Make the repository where there is none, and upload every file of a folder in one commit.

    The hub's address is that of the variable HF_ENDPOINT, the token that of HF_TOKEN or of
    `hf auth login`. Large files go the way that huggingface_hub chooses.

    Args:
        folder: its files.
        repository: USER/NAME.
        kind: of repository.
        private: whether a repository that is made is private; one that exists stays as it is.

    Returns:
        The repository's address.

    Raises:
        ValueError: there is no token, or the hub refuses it, the name or a file.
    """
    from huggingface_hub import HfApi, get_session, get_token
    from huggingface_hub.errors import HfHubHTTPError

    get_session().timeout = TIMEOUT_S
    api = HfApi(token=get_token())
    try:
        made = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            repo_type=kind,
            commit_message="Upload by tercet.train.export",
        )
    except HfHubHTTPError as error:
        said = " ".join(str(error).split())[:500]
        raise ValueError(
            f"--push {repository}: the hub refuses: {said} (the folder is written: hf upload "
            f"{repository} {folder} sends it)"
        ) from error
    return str(made)


def check_push(repository: str) -> None:
    """Raises ValueError for a name that is no USER/NAME, and where there is no token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push must be USER/NAME: {error}") from error
    if repository.count("/") != 1:
        raise ValueError(f"--push must be USER/NAME, got {repository!r}")
    if get_token() is None:
        raise ValueError(
            "--push needs a token with the right to write: hf auth login, or the variable HF_TOKEN"
        )
