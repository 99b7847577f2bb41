"""The Hugging Face hub on 127.0.0.1: folders as repositories, for the real client of the hub."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

COMMIT = "c" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Serves ROOT/USER/NAME, each with the README.md and .gitattributes that real ones have."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.requests = root, list[str]()
        self.gated: dict[str, int] = {}
        """Repositories that are refused, with the status: 401 without a token, 403 with one."""
        self.revisions: dict[str, dict[str, str]] = {}
        """By repository and revision the commit; its files lie in ROOT/commits/NAME/COMMIT."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def repository(self, name: str) -> Path:
        """The folder of a repository, which is made if it is not there."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(f"# {name}\n")
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        return folder

    def keep(self, name: str, commit: str, *revisions: str) -> None:
        """Keeps a repository's files as they are now, as a commit that has these names, too."""
        shutil.copytree(self.root / name, self.root / "commits" / name / commit)
        self.revisions.setdefault(name, {}).update(dict.fromkeys((commit, *revisions), commit))

    def at(self, name: str, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a revision; None where there is none."""
        if revision in ("main", COMMIT):
            return COMMIT, self.root / name
        commit = self.revisions.get(name, {}).get(revision)
        return (commit, self.root / "commits" / name / commit) if commit else None

    def files(self, folder: Path) -> list[dict[str, object]]:
        """The listing of the files in a folder, as the hub tells it."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                "oid": _hash(path),
            }
            for path in paths
        ]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = urllib.parse.urlparse(self.path).path
        self.server.requests.append(f"{self.command} {urllib.parse.unquote(path)}")
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        found = self.server.at(name, rest[1] if len(rest) > 1 else "main")
        if not (self.server.root / name).is_dir():
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif found is None:
            error = {"X-Error-Code": "RevisionNotFound"}
            self._answer(404, {"error": f"Invalid rev id: {rest[1]}"}, error)
        elif api and rest[:1] == ["tree"]:
            self._answer(200, self.server.files(found[1]))
        elif api:
            siblings = [{"rfilename": file["path"]} for file in self.server.files(found[1])]
            facts = {"id": name, "sha": found[0], "private": False, "tags": [], "downloads": 0}
            self._answer(200, {**facts, "likes": 0, "modelId": name, "siblings": siblings})
        elif name in self.server.gated:
            error = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is limited"}
            self._answer(self.server.gated[name], {}, error)
        else:
            self._file(found[1] / "/".join(rest[2:]), found[0])

    do_HEAD = do_GET

    def _file(self, path: Path, sha: str) -> None:
        commit = {"X-Repo-Commit": sha}
        if path.is_file():
            self._answer(200, path.read_bytes(), commit | {"ETag": f'"{_hash(path)}"'})
        else:
            self._answer(404, {}, commit | {"X-Error-Code": "EntryNotFound"})

    def _answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *given: object) -> None:
        pass


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """A hub of the repositories in a folder, until the block ends."""
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@contextlib.contextmanager
def in_place_of_the_hub(root: Path, monkeypatch: object) -> Iterator[Hub]:
    """The same, and the hub's client in this process asks it, with an empty cache."""
    with serve(root / "hub") as hub:
        constants = "huggingface_hub.constants"
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(root / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(f"{constants}.{name}", value)  # type: ignore[attr-defined]
        yield hub
