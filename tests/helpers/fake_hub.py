"""A Hugging Face hub on loopback: serves folders as models and datasets, and makes trouble if told.

    with FakeHub() as hub:
        commit = hub.publish("dataset", "owner/pairs", folder)  # again: main moves, this one stays
        hub.troubles["pairs.jsonl"] = "flip"  # by a part of "GET /owner/pairs/resolve/…"
        subprocess.run(…, env=os.environ | hub.environ(home))

Troubles: `missing`, `gated`, `moved`, `absent`, `unauthorized`, `forbidden` (the hub says no),
`error` and `busy` (500, 429), `hang` (it never answers); of a file: `flip` (one bit is another),
`cut` (the connection breaks half-way), `stall` (nothing more comes from there), `short` (half of
it, in good order). Once the `with` is left, its address refuses connections.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = {".safetensors", ".parquet", ".gz"}  # what the hub keeps in LFS, and names by its SHA-256
REFUSALS = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo")}
REFUSALS |= {"error": (500, ""), "busy": (429, ""), "absent": (404, "")}
REFUSALS |= {"unauthorized": (401, ""), "forbidden": (403, ""), "moved": (404, "RevisionNotFound")}


class FakeHub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.troubles: dict[str, str] = {}
        self.asked: list[str] = []  # every request, as "HEAD /owner/name/resolve/…"
        self.refs: dict[str, dict[str, str]] = {}  # of "models/owner/name"
        self.files: dict[str, dict[str, bytes]] = {}  # of "models/owner/name@commit"
        self.closing = threading.Event()

    def publish(self, kind: str, repo: str, folder: Path, ref: str = "main") -> str:
        """The commit that `ref` of a "model" or "dataset" now is: the folder's files, copied."""
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
        commit = _git("commit", repr(files).encode())
        self.refs.setdefault(f"{kind}s/{repo}", {})[ref] = commit
        self.files[f"{kind}s/{repo}@{commit}"] = files
        return commit

    def environ(self, home: Path) -> dict[str, str]:
        """For a process that shall know this hub alone."""
        alone = {"HF_HUB_OFFLINE": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home)} | alone

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Answer(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Understands /api/{kind}/{repo}[/{revision|tree}/{revision}[/{folder}]] and
        [/datasets]/{repo}/resolve/{revision}/{file}."""
        url = urlsplit(self.path)
        asked = f"{self.command} {unquote(url.path)}"
        self.server.asked.append(asked)
        self.trouble = next((t for part, t in self.server.troubles.items() if part in asked), "")
        if self.trouble == "hang":
            self.close_connection = self.server.closing.wait()
            return None
        if self.trouble in REFUSALS:
            return self._send(REFUSALS[self.trouble][0], X_Error_Code=REFUSALS[self.trouble][1])

        path, flags = url.path.removeprefix("/api").lstrip("/"), url.query.lower()
        if not path.startswith(("models/", "datasets/")):
            path = f"models/{path}"
        parts = [unquote(part) for part in path.split("/", 5)]
        kind, owner, name, verb, revision, path = (parts + [""] * 5)[:6]
        refs = self.server.refs.get(f"{kind}/{owner}/{name}")
        if refs is None:
            return self._send(404, X_Error_Code="RepoNotFound")
        commit = refs.get(revision or "main", revision)
        files = self.server.files.get(f"{kind}/{owner}/{name}@{commit}")
        if files is None:
            return self._send(404, X_Error_Code="RevisionNotFound")
        if verb == "resolve" and path in files:
            return self._file(_entry(path, files[path]), files[path], commit)
        if verb == "tree" and (tree := _tree(files, path, "recursive=true" in flags)):
            return self._send(200, json.dumps(tree).encode())
        if verb in ("resolve", "tree"):
            return self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        entries = map(_entry, files, files.values())
        words = {"rfilename": "path", "size": "size", "blobId": "oid", "lfs": "lfs"}
        shown = list(words) if "blobs=true" in flags else ["rfilename"]
        siblings = [{word: entry.get(words[word]) for word in shown} for entry in entries]
        info = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(info).encode())

    do_HEAD = do_GET

    def _file(self, entry: dict[str, Any], content: bytes, commit: str) -> None:
        half, etag = len(content) // 2, f'"{entry.get("lfs", entry)["oid"]}"'
        headers = {"X_Repo_Commit": commit, "ETag": etag}
        if "lfs" in entry:
            headers |= {"X_Linked_Etag": etag, "X_Linked_Size": str(len(content))}
        if self.trouble == "flip":
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        if self.trouble == "short" and self.command == "GET":
            content = content[:half]
        first = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if first:  # the client goes on where a connection broke
            headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        end = max(0, half - first) if self.trouble in ("cut", "stall") else None
        self._send(206 if first else 200, content[first:], end, **headers)

    def _send(self, status: int, body: bytes = b"", end: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content_Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:end])
            if self.trouble == "stall":
                self.wfile.flush()
                self.server.closing.wait()
            self.close_connection |= end is not None

    def log_message(self, *_: object) -> None:
        pass


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """What the listing of a tree says of a file."""
    entry = {"type": "file", "path": name, "size": len(content), "oid": _git("blob", content)}
    if Path(name).suffix in LARGE:
        digest, size = hashlib.sha256(content).hexdigest(), len(content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"
        lfs = {"oid": digest, "sha256": digest, "size": size, "pointerSize": len(pointer)}
        entry |= {"oid": _git("blob", pointer.encode()), "lfs": lfs}
    return entry


def _tree(files: dict[str, bytes], top: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries of the files and the folders in a folder; none of a folder that is not there."""
    top = top and f"{top}/"
    inside = [name for name in files if name.startswith(top)]
    folders = {f"{top}{p}" for name in inside for p in Path(name.removeprefix(top)).parents[:-1]}
    entries = [_entry(name, files[name]) for name in inside]
    entries += [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in folders]
    return [e for e in entries if recursive or "/" not in e["path"].removeprefix(top)]


def _git(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()
