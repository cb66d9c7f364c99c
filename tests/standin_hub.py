"""A stand-in for the Hub on 127.0.0.1: as much of its protocol as reading a data set takes."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_dataset(name: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve data set `name` with `files`; yields the endpoint and the list of requests, which grows."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer()

        def answer(self):
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            entries = [{"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in files.items()]
            info = {"id": name, "sha": COMMIT, "private": False, "gated": False, "tags": [], "downloads": 0}
            info["siblings"] = [{"rfilename": f} for f in files]
            if re.fullmatch(f"/api/datasets/{name}(/revision/[^/]+)?", path):
                self.send_json(info)
            elif path.startswith(f"/api/datasets/{name}/paths-info/"):
                self.send_json(entries)
            elif match := re.fullmatch(f"/api/datasets/{name}/tree/[^/]+(?:/(.*))?", path):
                self.send_json(self.tree(entries, match[1] or ""))
            elif (match := re.fullmatch(f"/datasets/{name}/resolve/[^/]+/(.*)", path)) and match[1] in files:
                self.send_file(files[match[1]])
            else:
                self.send_error_code(404)

        def tree(self, entries: list[dict], folder: str) -> list[dict]:
            below = [e for e in entries if e["path"].startswith(f"{folder}/" if folder else "")]
            if "recursive=True" in self.path or "recursive=true" in self.path:
                return below
            depth = folder.count("/") + 2 if folder else 1
            paths = {"/".join(e["path"].split("/")[:depth]): e for e in below}
            return [
                e if e["path"] == path else {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
                for path, e in paths.items()
            ]

        def send_json(self, value):
            self.send_bytes(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send_file(self, content: bytes):
            headers = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
                self.send_bytes(206, content[first : last + 1], headers)
            else:
                self.send_bytes(200, content, headers)

        def send_error_code(self, code: int):
            self.send_bytes(
                code, b"{}", {"X-Error-Code": "RepoNotFound" if "resolve" not in self.path else "EntryNotFound"}
            )

        def send_bytes(self, code: int, body: bytes, headers: dict[str, str]):
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
