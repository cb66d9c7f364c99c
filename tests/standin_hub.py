"""A stand-in for the Hub on 127.0.0.1: as much of its protocol as it takes to make repositories, to upload to them,
to tag, to list and to download, with the ways in which it fails. By itself it serves until it is stopped:

    python tests/standin_hub.py
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_test"
USER = "user"


@dataclass
class Repository:
    """Files by commit, and what the names of revisions stand for."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    tags: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # sha256 of the files that were uploaded as such

    def commit_of(self, revision: str) -> str | None:
        name = revision.removeprefix("refs/heads/")
        commit = self.branches.get(name) or self.tags.get(name) or name
        return commit if commit in self.commits else None

    def add(self, files: dict[str, bytes], message: str, commit: str | None = None) -> str:
        commit = commit or hashlib.sha1(f"{message}{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = self.commits[self.branches["main"]] | files
        self.branches["main"] = commit
        self.messages.append(message)
        return commit


@dataclass
class StandIn:
    """The state of the stand-in.

    Attributes:
        repositories: by `models/USER/NAME` or `datasets/USER/NAME`.
        objects: large files that were uploaded, by sha256.
        requests: method and path of each.
        failing: the status that every request is answered with; "hang" for no answer until it is reset.
        token: that it knows; `role`, what it is good for.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failing: int | str | None = None
    token: str = TOKEN
    role: str | None = "write"
    answering: threading.Event = field(default_factory=threading.Event)

    def environment(self) -> dict[str, str]:
        """The environment of a process that takes it for the Hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        }


@contextmanager
def serve_dataset(name: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve data set `name` with `files`; yields the endpoint and the list of requests, which grows."""
    with serve() as hub:
        repository = hub.repositories[f"datasets/{name}"] = Repository()
        repository.add(files, "files", COMMIT)
        yield hub.endpoint, hub.requests


@contextmanager
def serve(hub: StandIn | None = None) -> Iterator[StandIn]:
    """A Hub that knows TOKEN as USER's: one with no repositories, or one that was served before."""
    hub = hub or StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.answering.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers a request."""

    hub: StandIn

    def do_HEAD(self):
        self.answer()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.failing == "hang":
            self.hub.answering.wait()
            self.close_connection = True
            return
        if self.hub.failing is not None:
            self.fail(self.hub.failing, "it fails")
            return
        writes = self.command in ("POST", "DELETE") and "paths-info" not in path and "yaml" not in path
        if (writes or "whoami" in path) and (refused := self.refusal()):
            self.fail(*refused)
            return
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                getattr(self, method)(*match.groups())
                return
        self.fail(404, "no such address")

    def refusal(self) -> tuple[int, str] | None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return 401, "Invalid credentials in Authorization header"
        if self.hub.role == "read" and "whoami" not in self.path:
            return 403, "You don't have the rights to write here"
        return None

    def repository(self, place: str, revision: str = "main") -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(place)
        if repository is None:
            if "Authorization" in self.headers:
                self.fail(404, "Repository not found", "RepoNotFound")
            else:
                self.fail(401, "Invalid username or password.")
            return None
        commit = repository.commit_of(revision)
        if commit is None:
            self.fail(404, "Revision not found", "RevisionNotFound")
            return None
        return repository, commit

    def whoami(self):
        about: dict[str, object] = {"name": USER, "orgs": [], "auth": {"accessToken": {"role": self.hub.role}}}
        self.send_json(about if self.hub.role else {"name": USER})

    def check(self, place: str):
        if self.repository(place):
            if refused := self.refusal():
                self.fail(*refused)
            else:
                self.send_json({})

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or USER
        place = f"{wanted.get('type', 'model')}s/{owner}/{wanted['name']}"
        if owner != USER:
            self.fail(403, "You don't have the rights to create a model under this namespace")
        elif place in self.hub.repositories:
            self.send_json({"error": "You already created this repo", "url": self.address(place)}, status=409)
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repositories[place] = Repository(private)
            self.send_json({"url": self.address(place)})

    def validate(self):
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, place: str, revision: str):
        if found := self.repository(place, revision):
            repository, commit = found
            files = []
            for file in json.loads(self.body)["files"]:
                large = file["path"].endswith((".safetensors", ".npy", ".png", ".bin"))
                there = repository.commits[commit].get(file["path"])
                oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_hash(there)
                mode = "lfs" if large else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.send_json({"files": files})

    def lfs_batch(self, place: str):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
            missing = wanted["oid"] not in self.hub.objects
            objects.append(wanted | ({"actions": {"upload": upload}} if missing else {}))
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.fail(400, "not the content of this hash")
            return
        self.hub.objects[oid] = self.body
        self.send_bytes(200, b"", {})

    def commit(self, place: str, revision: str):
        if found := self.repository(place, revision):
            repository, _ = found
            lines = [json.loads(line) for line in self.body.splitlines()]
            files = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                    repository.lfs.add(value["oid"])
            commit = repository.add(files, next(li["value"]["summary"] for li in lines if li["key"] == "header"))
            url = f"{self.address(place)}/commit/{commit}"
            self.send_json({"success": True, "commitUrl": url, "commitOid": commit})

    def refs(self, place: str):
        if found := self.repository(place):
            repository, _ = found
            kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
            listed = {
                kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": c} for n, c in names.items()]
                for kind, (ref, names) in kinds.items()
            }
            self.send_json({**listed, "converts": []})

    def tag(self, place: str, revision: str):
        name = json.loads(self.body)["tag"]
        if found := self.repository(place, revision):
            repository, commit = found
            if name in repository.tags:
                self.fail(409, "Tag already exists")
            else:
                repository.tags[name] = commit
                self.send_json({})

    def delete_tag(self, place: str, name: str):
        if found := self.repository(place):
            del found[0].tags[name]
            self.send_json({})

    def info(self, place: str, revision: str | None):
        if found := self.repository(place, revision or "main"):
            repository, commit = found
            self.send_json({
                "id": place.partition("/")[2],
                "sha": commit,
                "private": repository.private,
                "gated": False,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": name} for name in repository.commits[commit]],
            })  # fmt: skip

    def paths_info(self, place: str, revision: str):
        if found := self.repository(place, revision):
            self.send_json(self.entries(*found))

    def tree(self, place: str, revision: str, folder: str | None):
        if not (found := self.repository(place, revision)):
            return
        folder = folder or ""
        below = [e for e in self.entries(*found) if e["path"].startswith(f"{folder}/" if folder else "")]
        if "recursive=true" not in self.path.lower():
            depth = folder.count("/") + 2 if folder else 1
            paths = {"/".join(e["path"].split("/")[:depth]): e for e in below}
            below = [
                e if e["path"] == path else {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
                for path, e in paths.items()
            ]
        self.send_json(below)

    def entries(self, repository: Repository, commit: str) -> list[dict]:
        files = repository.commits[commit]
        return [{"type": "file", "path": name, "size": len(b), "oid": git_hash(b)} for name, b in files.items()]

    def resolve(self, place: str, revision: str, name: str):
        place = place if place.startswith("datasets/") else f"models/{place}"
        if not (found := self.repository(place, revision)):
            return
        repository, commit = found
        if name not in repository.commits[commit]:
            self.fail(404, "Entry not found", "EntryNotFound")
            return
        content = repository.commits[commit][name]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            self.send_bytes(206, content[first : last + 1], headers)
        else:
            self.send_bytes(200, content, headers)

    def address(self, place: str) -> str:
        return f"{self.hub.endpoint}/{place.removeprefix('models/')}"

    def send_json(self, value, status: int = 200):
        self.send_bytes(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, message: str, code: str | None = None):
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        self.send_bytes(
            status, json.dumps({"error": message}).encode(), headers | ({"X-Error-Code": code} if code else {})
        )

    def send_bytes(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def git_hash(content: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_PLACE = r"((?:models|datasets)/[^/]+/[^/]+)"
ROUTES = {
    r"GET /api/whoami-v2": "whoami",
    rf"GET /api/{_PLACE}/auth-check(?:/write)?": "check",
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate",
    rf"POST /api/{_PLACE}/preupload/([^/]+)": "preupload",
    rf"POST /api/{_PLACE}/commit/([^/]+)": "commit",
    rf"GET /api/{_PLACE}/refs": "refs",
    rf"POST /api/{_PLACE}/tag/([^/]+)": "tag",
    rf"DELETE /api/{_PLACE}/tag/([^/]+)": "delete_tag",
    rf"GET /api/{_PLACE}(?:/revision/([^/]+))?": "info",
    rf"POST /api/{_PLACE}/paths-info/([^/]+)": "paths_info",
    rf"GET /api/{_PLACE}/tree/([^/]+)(?:/(.*))?": "tree",
    r"POST /((?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch": "lfs_batch",
    r"PUT /lfs/([0-9a-f]{64})": "lfs_upload",
    r"(?:GET|HEAD) /((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.*)": "resolve",
}


if __name__ == "__main__":  # to try publishing without an account
    with serve() as here:
        print("export " + " ".join(f"{name}={value}" for name, value in here.environment().items()), flush=True)
        threading.Event().wait()
