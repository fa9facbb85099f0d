"""The Hugging Face hub: what this machine has of it, and what it must bring.

What is cached wins, and is used with no request at all; the hub is asked only for what is not here.
Asked, it has `TIMEOUT` to answer, and HF_HUB_DOWNLOAD_TIMEOUT for each part of what it sends:
`huggingface_hub` by itself waits for ever for a listing that hangs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import DataError, ModelError, briefly

TIMEOUT = 5  # seconds
COMMIT = re.compile(r"[0-9a-f]{40}")
# The README names the licence.
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")

ADVICE = {  # by the status that the hub answers with
    401: "set HF_TOKEN to a token that is valid",
    403: "set HF_TOKEN to a token that may read it",
    404: "check the name and the revision",
    429: "it has had too many requests: wait some minutes, or set HF_TOKEN",
}


@dataclass(frozen=True)
class Repo:
    """What a recipe wants of a repository. Whatever is not to be had raises ModelError, DataError.

    A script that comes with a dataset is never brought.
    """

    kind: str  # "model" or "dataset"
    name: str
    revision: str | None = None  # branch, tag or commit; None: main
    wanted: tuple[str, ...] = ("*",)

    def commit(self, *, newest: bool = False) -> str:
        """The 40-hex commit of the revision: the cached one, else the hub's; the hub's, if it is
        the `newest` that is asked for."""
        if self.revision and self._is_commit and not newest:
            return self.revision
        found = None if newest else self.cached()
        try:
            return found or self._ask(self.revision)
        except Exception as error:
            raise self._trouble(error) from error

    def cached(self) -> str | None:
        """The commit that this machine has of the revision."""
        ref = self._folder / "refs" / (self.revision or "main")
        commit = self.revision if self._is_commit else ref.is_file() and ref.read_text().strip()
        return commit if commit and self._is_whole(commit) else None

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit in the cache, with all files that are wanted.

        Where this machine had none of the revision, it has this one now.
        """
        from huggingface_hub import snapshot_download

        bound()
        scripts = ["*.py"] if self.kind == "dataset" else None
        words: dict[str, Any] = {"allow_patterns": list(self.wanted), "ignore_patterns": scripts}
        words |= {"repo_type": self.kind, "revision": commit}
        for here in (True, False):
            try:
                if not here:
                    self._ask(commit)
                folder = Path(snapshot_download(self.name, local_files_only=here, **words))
            except Exception as error:
                reason = error
                continue
            if self._is_whole(commit):
                if not self.cached():
                    self.keep(commit)
                return folder
            lacks = "all its weights in safetensors" if self.kind == "model" else "a list of files"
            reason = FileNotFoundError(f"it has not {lacks}")
        raise self._trouble(reason) from reason

    def config(self, commit: str) -> Path:
        """A folder with a model's config.json at a commit, and perhaps no more of it."""
        from huggingface_hub import hf_hub_download

        bound()
        try:
            return Path(hf_hub_download(self.name, "config.json", revision=commit)).parent
        except Exception as error:
            raise self._trouble(error) from error

    def keep(self, commit: str) -> None:
        """From now on, `commit` is what this machine has of the revision."""
        if not self._is_commit:
            ref = self._folder / "refs" / (self.revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)

    def verify(self, commit: str) -> int:
        """Compare each file of a commit that is here with the hub's digest; returns how many.

        What differs is brought again, once, for a plain download leaves a damaged file as it is;
        and what still differs then does not stay.
        """
        from huggingface_hub import HfApi, hf_hub_download

        bound()
        words = {"repo_type": self.kind, "revision": commit}
        try:
            found = HfApi().verify_repo_checksums(self.name, **words)
            for damaged in found.mismatches:
                hf_hub_download(self.name, damaged["path"], force_download=True, **words)
            if found.mismatches:
                found = HfApi().verify_repo_checksums(self.name, **words)
        except Exception as error:
            raise self._trouble(error) from error
        for damaged in found.mismatches:
            file = found.verified_path / damaged["path"]
            if file.is_symlink():
                (file.parent / file.readlink()).unlink()
            file.unlink()
        if found.mismatches:
            path = found.mismatches[0]["path"]
            raise self._trouble(OSError(f"{path} is not what the hub's digest says"))
        return found.checked_count

    @property
    def _is_commit(self) -> bool:
        return bool(self.revision and COMMIT.fullmatch(self.revision))

    @property
    def _folder(self) -> Path:
        """What the cache has of the repository."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        place = repo_folder_name(repo_id=self.name, repo_type=self.kind)
        return Path(constants.HF_HUB_CACHE) / place

    def _is_whole(self, commit: str) -> bool:
        """Without the hub's list of files, `snapshot_download` takes any part for the whole."""
        if self.kind == "dataset":
            return (self._folder / "trees" / f"{commit}.json").is_file()
        folder = self._folder / "snapshots" / commit
        if "*.py" in self.wanted and not any(folder.glob("*.py")):
            return False
        index = folder / "model.safetensors.index.json"
        try:
            named = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ()
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        found = {file.name for file in folder.glob("*.safetensors")}
        return bool(found) and found.issuperset(named)

    def _ask(self, revision: str | None) -> str:
        from huggingface_hub import HfApi

        words = {"repo_type": self.kind, "timeout": TIMEOUT}
        return HfApi().repo_info(self.name, revision=revision, **words).sha

    def _trouble(self, error: Exception) -> DataError | ModelError:
        """The hub's own first line says what went wrong; by what it is, what to do."""
        return (DataError if self.kind == "dataset" else ModelError)(
            f"the {self.kind} {self.name} is neither on this machine nor to be had from the hub "
            f"({briefly(error)})",
            f"{self._advice(error)}, or name a local folder (./…) as the {self.kind}",
        )

    def _advice(self, error: BaseException) -> str:
        from huggingface_hub import constants, errors

        not_here = isinstance(error, errors.LocalEntryNotFoundError)
        if not_here and error.__cause__:
            error = error.__cause__
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
        if isinstance(error, errors.OfflineModeIsEnabled) or not_here and constants.HF_HUB_OFFLINE:
            what = "HF_HUB_OFFLINE is set: unset it, or `rlhf-recipes fetch`"
            return f"{what} where there is a network"
        if isinstance(error, errors.GatedRepoError):
            place = f"https://huggingface.co/{'datasets/' * (self.kind == 'dataset')}{self.name}"
            return f"ask for access at {place}, and set HF_TOKEN to a token of yours"
        if isinstance(error, errors.RevisionNotFoundError):
            return "that revision is not there, or not any more: name another as `revision`"
        if isinstance(error, errors.RepositoryNotFoundError):
            return "check the name; if it is private, set HF_TOKEN to a token that may read it"
        if status >= 500:
            return "it has trouble of its own: try again later"
        if isinstance(error, FileNotFoundError) and not status:
            return "check the name"
        return ADVICE.get(status, "check the network: the same command goes on where it broke off")


def bound(seconds: float | None = None) -> None:
    """Let no request of `huggingface_hub` wait for ever: some of them have no setting for it.

    None is HF_HUB_DOWNLOAD_TIMEOUT.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def bound(request: Any) -> None:
        waits = request.extensions.get("timeout", {})
        most = seconds or constants.HF_HUB_DOWNLOAD_TIMEOUT
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: min(waits.get(kind) or most, most) for kind in kinds}

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks["request"].append(bound)
        return made

    set_client_factory(client)


def says_no(error: BaseException | None) -> bool:
    """Whether the hub has answered, and refused; else it is out of reach."""
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
    return status < 500 and status not in (408, 429)
