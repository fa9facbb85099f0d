"""A folder, uploaded to the hub as a private model of its own."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_recipes.errors import ModelError, UsageError, briefly
from rlhf_recipes.sources.hub import TIMEOUT, bound

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
TOKENS = "https://huggingface.co/settings/tokens"
UPLOAD_SECONDS = 600  # for one answer: storing a large file takes the hub a while
EMPTY = {".gitattributes"}  # what the hub puts into a new repository

ADVICE = {  # by the status that the hub answers with
    401: f"set HF_TOKEN to a token that is valid: {TOKENS}",
    403: f"set HF_TOKEN to a token that may write there: {TOKENS}",
    404: "check the name of the user or organization",
    409: "another change came first, or the name is taken",
    429: "the hub has had too many requests: wait some minutes",
}


def open_repo(name: str) -> None:
    """Make the private repository `name`, or find that it is there and empty.

    Raises UsageError where the name, the token or the network is missing or the repository has
    files; ModelError where the hub refuses.
    """
    from huggingface_hub import HfApi, constants, errors, get_token

    if not NAME.fullmatch(name):
        raise UsageError(f"--push takes user/name, not {name!r}", "name a repository of yours")
    if constants.HF_HUB_OFFLINE:
        raise UsageError("HF_HUB_OFFLINE is set, so nothing can be pushed", "unset it")
    if not get_token():
        hint = f"set HF_TOKEN, or run `hf auth login`: {TOKENS}"
        raise UsageError("there is no token to push with", hint)
    bound()
    public = False
    try:
        try:
            found = HfApi().repo_info(name, timeout=TIMEOUT)
            siblings, public = found.siblings or [], found.private is False
        except errors.RepositoryNotFoundError:
            siblings = []
            HfApi().create_repo(name, private=True)
    except Exception as error:
        raise _trouble(name, error) from error
    if public:
        hint = "make it private there, or name another repository"
        raise UsageError(
            f"{name} is public on the hub, and a model is pushed to private ones", hint
        )
    if files := {one.rfilename for one in siblings} - EMPTY:
        what = f"{name} on the hub has files already, such as {min(files)}"
        raise UsageError(what, "name another repository, or upload the folder with `hf upload`")


def push(name: str, folder: Path) -> str:
    """Upload all of `folder` in one commit; returns the address of the model. Raises ModelError."""
    from huggingface_hub import HfApi, constants

    bound(UPLOAD_SECONDS)
    words = {"repo_id": name, "folder_path": folder, "commit_message": "Upload by rlhf-recipes"}
    try:
        HfApi().upload_folder(**words)
    except Exception as error:
        raise _trouble(name, error, f"; {folder} is whole: `hf upload {name} {folder}`") from error
    return f"{constants.ENDPOINT}/{name}"


def _trouble(name: str, error: Exception, after: str = "") -> ModelError:
    from huggingface_hub.errors import HfHubHTTPError

    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
    advice = "the hub has trouble of its own: try again later" if status >= 500 else ""
    advice = advice or ADVICE.get(status, "check the network")
    return ModelError(f"{name} was not pushed ({briefly(error)})", advice + after)
