"""A Hugging Face hub on loopback: serves folders as models and datasets, takes uploads of models,
and makes trouble if told.

    with FakeHub() as hub:
        commit = hub.publish("dataset", "owner/pairs", folder)  # again: main moves, this one stays
        hub.troubles["pairs.jsonl"] = "flip"  # by a part of "GET /owner/pairs/resolve/…"
        subprocess.run(…, env=os.environ | hub.environ(home))

Troubles: `missing`, `gated`, `moved`, `absent`, `unauthorized`, `forbidden` (the hub says no),
`error` and `busy` (500, 429), `hang` (it never answers); of a file: `flip` (one bit is another),
`cut` (the connection breaks half-way), `stall` (nothing more comes from there), `short` (half of
it, in good order). Once the `with` is left, its address refuses connections.

Who uploads needs TOKEN. What it made is in `hub.content("model", "owner/name")`, and its name in
`hub.private` where it shall be private.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers.loopback import Loopback

LARGE = {".safetensors", ".parquet", ".gz"}  # what the hub keeps in LFS, and names by its SHA-256
REFUSALS = {"missing": (404, "RepoNotFound"), "gated": (403, "GatedRepo")}
REFUSALS |= {"error": (500, ""), "busy": (429, ""), "absent": (404, "")}
REFUSALS |= {"conflict": (409, "")}
REFUSALS |= {"unauthorized": (401, ""), "forbidden": (403, ""), "moved": (404, "RevisionNotFound")}
TOKEN = "hf_" + "a" * 34


class FakeHub(Loopback):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.troubles: dict[str, str] = {}
        self.asked: list[str] = []  # every request, as "HEAD /owner/name/resolve/…"
        self.refs: dict[str, dict[str, str]] = {}  # of "models/owner/name"
        self.files: dict[str, dict[str, bytes]] = {}  # of "models/owner/name@commit"
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}  # LFS objects, by their SHA-256
        self.closing = threading.Event()

    def publish(self, kind: str, repo: str, folder: Path, ref: str = "main") -> str:
        """The commit that `ref` of a "model" or "dataset" now is: the folder's files, copied."""
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
        return self.commit(f"{kind}s/{repo}", files, ref)

    def commit(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        commit = _git("commit", repr(files).encode())
        self.refs.setdefault(repo, {})[ref] = commit
        self.files[f"{repo}@{commit}"] = files
        return commit

    def content(self, kind: str, repo: str) -> dict[str, bytes]:
        """The files that main has."""
        return self.files[f"{kind}s/{repo}@{self.refs[f'{kind}s/{repo}']['main']}"]

    def environ(self, home: Path) -> dict[str, str]:
        """For a process that shall know this hub alone."""
        alone = {"HF_HUB_OFFLINE": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home)} | alone


class _Answer(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Understands /api/{kind}/{repo}[/{revision|tree}/{revision}[/{folder}]] and
        [/datasets]/{repo}/resolve/{revision}/{file}."""
        url = urlsplit(self.path)
        if self._troubled(url.path):
            return None
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
        private = f"{owner}/{name}" in self.server.private
        info = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings, "private": private}
        self._send(200, json.dumps(info).encode())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Understands what an upload of a folder asks for: a repository, and one commit into it."""
        path = urlsplit(self.path).path
        body = self._body()
        if self._troubled(path):
            return None
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._send(401)
        said = [json.loads(line) for line in body.splitlines()]
        if path == "/api/repos/create":
            repo = f"models/{said[0]['organization']}/{said[0]['name']}"
            if repo in self.server.refs:
                return self._send(409)
            self.server.private |= {repo[7:]} if said[0].get("visibility") == "private" else set()
            self.server.commit(repo, {".gitattributes": b""})
            return self._json({"url": f"{self.server.url}/{repo[7:]}"})
        if path == "/api/validate-yaml":
            return self._json({})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = said[0]["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
            return self._json({"objects": objects})
        *_, owner, name, verb, _ = path.split("/")
        repo = f"models/{owner}/{name}"
        if repo not in self.server.refs:
            return self._send(404, X_Error_Code="RepoNotFound")
        if verb == "preupload":
            kinds = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": kinds[Path(f["path"]).suffix in LARGE]}
                for f in said[0]["files"]
            ]
            return self._json({"files": [file | {"shouldIgnore": False} for file in files]})
        files = dict(self.server.content("model", f"{owner}/{name}"))
        for line in said:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        commit = self.server.commit(repo, files)
        url = f"{self.server.url}/{owner}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit})

    def do_PUT(self) -> None:
        content = self._body()
        if not self._troubled(self.path):
            self.server.stored[hashlib.sha256(content).hexdigest()] = content
            self._send(200)

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _troubled(self, path: str) -> bool:
        """Notes what is asked for; whether the answer is the trouble that was ordered."""
        asked = f"{self.command} {unquote(path)}"
        self.server.asked.append(asked)
        self.trouble = next((t for part, t in self.server.troubles.items() if part in asked), "")
        if self.trouble == "hang":
            self.close_connection = self.server.closing.wait()
        elif self.trouble in REFUSALS:
            status, code = REFUSALS[self.trouble]
            self._send(status, X_Error_Code=code)
        else:
            return False
        return True

    def _json(self, value: dict[str, Any]) -> None:
        self._send(200, json.dumps(value).encode())

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
        if self.command != "HEAD":
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
