"""Upload of a folder to the Hugging Face hub, as a dataset."""

from __future__ import annotations

import re
from pathlib import Path

from stepladder.core.errors import UserError
from stepladder.core.redact import redact


def asked(repo: str | None, upload: bool) -> str | None:
    """``repo`` if an upload to it is asked for and can be tried, else None.

    Only one of the two, half a name, no client or no token is a UserError.
    """
    if not repo and not upload:
        return None
    if not repo or not upload:
        raise UserError("an upload needs both --hf-repo OWNER/NAME and --hf-upload; give both or neither")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"'{repo}' is no name on the hub; give --hf-repo OWNER/NAME")
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise UserError("an upload needs huggingface_hub: pip install 'stepladder[hf]'") from error
    if not get_token():
        raise UserError("no Hugging Face token: set HF_TOKEN to one that may write, or run `hf auth login`")
    return repo


def upload(folder: str | Path, repo: str, private: bool = False) -> str:
    """Create the dataset ``repo`` (OWNER/NAME) unless it exists, upload every file of ``folder``; returns its address.

    Whatever the hub or the way to it has against this is a UserError.
    """
    asked(repo, True)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        created = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, repo_type="dataset", commit_message="CompGen")
    except Exception as error:  # the client's many kinds, its HTTP library's, the disk's: all in the way, none ours
        reason = " ".join(str(redact(str(error))).split())
        raise UserError(f"upload of {folder} to '{repo}' failed: {reason}; the same command tries again") from error
    return str(created)
