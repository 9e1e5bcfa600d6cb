"""The page of runs that go on, on this machine alone: it looks for what is new every few seconds.

It answers two addresses, "/" and "/data.json", both made from the run directories that it was started with, and reads
no other file. It listens on the loopback interface, and refuses requests that name another host: a web page elsewhere,
which can make a browser send them, gets nothing to read.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from cero_jax.report.html import as_json, page, page_data
from cero_jax.report.read_run import read_run
from cero_jax.terminal import printable

HOST = "127.0.0.1"
SECONDS = 5  # between two looks at the runs
FILES = ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "config.json", "prompts.json")  # that a page is made of
REFRESH = f"""
let seen = null;
async function refresh() {{
  try {{
    const answer = await fetch("data.json", {{ headers: seen ? {{ "If-None-Match": seen }} : {{}} }});
    if (answer.status === 200) {{ seen = answer.headers.get("ETag"); show(await answer.json()); }}
  }} catch {{ byId("state").textContent = "The server has gone; this is what it said last."; }}
  setTimeout(refresh, {1000 * SECONDS});
}}
setTimeout(refresh, {1000 * SECONDS});
"""


class Source:
    """The data of the page, made anew where a file of a run has grown."""

    def __init__(self, run_dirs: Sequence[str]):
        self._run_dirs, self._lock = run_dirs, Lock()
        self._stamp: list | None = None
        self._data: dict[str, Any] = {"runs": []}

    def read(self) -> dict[str, Any]:
        """What `page_data` gives; where a run cannot be read now, what it gave before, and in "state" why."""
        with self._lock:
            if (stamp := _stamp(self._run_dirs)) != self._stamp:
                try:
                    self._data = page_data([read_run(path) for path in self._run_dirs])
                except (OSError, ValueError) as error:
                    self._data = {**self._data, "state": printable(str(error))}
                self._stamp = stamp
            return self._data


def _stamp(run_dirs: Sequence[str]) -> list[tuple[int, int]]:
    """The size of each file that a page is made of, and when it was written."""
    paths = [Path(each) / name for each in run_dirs for name in FILES]
    found = [path.stat() if path.is_file() else None for path in paths]
    return [(each.st_size, each.st_mtime_ns) if each else (0, 0) for each in found]


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, read: Callable[[], dict[str, Any]], *args):
        self._read = read
        super().__init__(*args)

    def do_GET(self) -> None:
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self.send_error(403, "this page is for this machine alone")
        elif self.path == "/":
            self._answer("text/html", page(self._read(), REFRESH, "; connect-src 'self'").encode())
        elif self.path == "/data.json":
            self._answer("application/json", as_json(self._read()).encode())
        else:
            self.send_error(404)

    def _answer(self, kind: str, body: bytes) -> None:
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        unchanged = self.headers.get("If-None-Match") == tag
        self.send_response(304 if unchanged else 200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(0 if unchanged else len(body)))
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if not unchanged:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


def server(run_dirs: Sequence[str], port: int) -> ThreadingHTTPServer:
    """A server of the runs' page, listening; port 0: any free one. Raises OSError where the port is taken."""
    return ThreadingHTTPServer((HOST, port), partial(_Handler, Source(run_dirs).read))
