"""A Hugging Face hub of one repository, for the real client of the hub: as a context manager, a server in a thread."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = "tandem-tests/tiny"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
"""Branch or tag -> its commit. Both have the same files."""


class FakeHub:
    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.downloads: list[str] = []
        """What was downloaded, as COMMIT/NAME."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(has_body=False)

            def do_GET(self) -> None:
                self._answer(has_body=True)

            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, *, has_body: bool) -> None:
                api, page = f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/resolve/"
                path = self.path.partition("?")[0]
                if path.startswith(api):
                    kind, _, revision = path.removeprefix(api).removeprefix("/").partition("/")
                    commit = COMMITS.get(revision or "main", revision)
                    if commit in COMMITS.values():
                        tree = [
                            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                            for name, data in hub.files.items()
                        ]
                        siblings = [{"rfilename": name} for name in hub.files]
                        whole = {"id": REPOSITORY, "sha": commit, "siblings": siblings}
                        body = json.dumps(tree if kind == "tree" else whole).encode()
                        return self._send(200, body, {"Content-Type": "application/json"}, has_body)
                elif path.startswith(page):
                    revision, _, name = path.removeprefix(page).partition("/")
                    commit = COMMITS.get(revision, revision)
                    if name in hub.files:
                        body = hub.files[name]
                        if has_body:
                            hub.downloads.append(f"{commit}/{name}")
                        etag = hashlib.sha1(body).hexdigest()
                        return self._send(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, has_body)
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, has_body)

            def _send(self, status: int, body: bytes, headers: Mapping[str, str], has_body: bool) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if has_body:
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server. Further calls do nothing."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """The environment of a process that uses this hub and a cache of its own."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**{name: value for name, value in os.environ.items() if not name.startswith("HF_")}, **own}
