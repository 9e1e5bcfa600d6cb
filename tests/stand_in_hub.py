"""A hub on this machine, as much of it as huggingface_hub asks for files: repositories of commits, main the newest."""

import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

KINDS = {"models": "", "datasets": "datasets/"}  # in an address of the API -> in one of a file


class Hub:
    """What it holds: by kind and name, each commit's files by their path."""

    def __init__(self):
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.address = ""

    def commit(self, repo: str, files: dict[str, bytes | str]) -> str:
        """Add a commit to "models/owner/name" or "datasets/owner/name"; returns its hash."""
        whole = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        self.repos.setdefault(repo, []).append({".gitattributes": b"", **whole})
        return self.newest(repo)

    def folder(self, repo: str, folder: Path) -> str:
        """Add a commit of a folder's files."""
        return self.commit(repo, {path.name: path.read_bytes() for path in folder.iterdir()})

    def newest(self, repo: str) -> str:
        """The hash of the newest commit."""
        return _hash(self.repos[repo][-1])

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.asked.append(path)
        api, path = path.startswith("/api/"), path.removeprefix("/api/").removeprefix("/")
        kind = next(
            (each for each, inside in KINDS.items() if path.startswith(each if api else inside or "//")), "models"
        )
        path = path.removeprefix(f"{kind}/")
        if path.count("/") < 3:  # the library asks for more, and can do without
            return 404, {}, b""
        owner, name, what, *rest = path.split("/", 3)
        repo, (revision, _, file) = f"{kind}/{owner}/{name}", "/".join(rest).partition("/")
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commits = {"main": self.repos[repo][-1]} | {_hash(files): files for files in self.repos[repo]}
        if revision not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = commits[revision]
        if what == "revision":
            return 200, {}, json.dumps({"id": f"{owner}/{name}", "sha": _hash(files), "siblings": []}).encode()
        if what == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": _hash(files)}, files[file]


def _hash(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def serving():
    """A hub, and its address, until the end."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            status, headers, body = hub.answer(unquote(urlsplit(self.path).path))
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        server.shutdown()
