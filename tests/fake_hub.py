"""A Hub on 127.0.0.1 that speaks as much HTTP as the real huggingface_hub client needs to upload a model."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """What the server holds, and what it is told to do.

    Attributes:
        repositories: Files by name, by repository.
        private: Visibility of each repository, as the client asked for it when it was created; None is not told.
        commits: Repository and names of the files of each commit.
        datasets: Visibility of repositories of data, by their names.
        requests: How often each kind of request was answered with success.
        failing: Kinds of request that are answered with `status`, each as many times as it says; "all" for every kind.
        status: HTTP status of a failure.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool | None] = {}
        self.commits: list[tuple[str, list[str]]] = []
        self.datasets: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}  # what was PUT, by SHA-256
        self.requests: Counter = Counter()
        self.failing: Counter = Counter()
        self.status = 503
        self.endpoint = ""
        self.lock = threading.Lock()

    def handle(self, kind: str, match: re.Match, body: bytes) -> tuple[int, dict]:
        with self.lock:
            for name in (kind, "all"):
                if self.failing[name] > 0:
                    self.failing[name] -= 1
                    return self.status, {"error": "out of order"}
            self.requests[kind] += 1
            return 200, getattr(self, kind)(match, body)

    def whoami(self, match, body):
        return {"name": "me", "type": "user", "orgs": []}

    def create(self, match, body):
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo_id not in self.repositories:
            self.repositories[repo_id] = {}
            self.private[repo_id] = asked.get("visibility") == "private"
        return {"url": f"{self.endpoint}/{repo_id}"}

    def info(self, match, body):
        repo_id = match["repo"]
        files = [{"rfilename": name} for name in self.repositories[repo_id]]
        return {"id": repo_id, "sha": "0" * 40, "private": self.private[repo_id], "tags": [], "siblings": files}

    def dataset(self, match, body):
        repo_id = match["repo"]
        return {"id": repo_id, "sha": "0" * 40, "private": self.datasets[repo_id], "tags": [], "siblings": []}

    def validate(self, match, body):
        return {"errors": [], "warnings": []}

    def preupload(self, match, body):
        there = self.repositories[match["repo"]]
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".png", ".bin"))
            content = there.get(file["path"])
            oid = None
            if content is not None:
                header = b"" if large else b"blob %d\0" % len(content)
                oid = (hashlib.sha256 if large else hashlib.sha1)(header + content).hexdigest()
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, match, body):
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.endpoint}/store/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self.stored else {**wanted, "actions": upload})
        return {"transfer": "basic", "objects": objects}

    def store(self, match, body):
        assert hashlib.sha256(body).hexdigest() == match["oid"]
        self.stored[match["oid"]] = body
        return {}

    def commit(self, match, body):
        files = self.repositories[match["repo"]]
        lines = [json.loads(line) for line in body.splitlines()]
        self.commits.append((match["repo"], [line["value"]["path"] for line in lines if "path" in line["value"]]))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        return {"commitUrl": f"{self.endpoint}/{match['repo']}/commit/{'0' * 40}", "commitOid": "0" * 40}


ROUTES = [
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main"),
    ("commit", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main"),
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/main)?"),
    ("dataset", "GET", r"/api/datasets/(?P<repo>[^/]+/[^/]+)"),
    ("batch", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("store", "PUT", r"/store/(?P<oid>\w+)"),
]


@contextmanager
def running_hub():
    """A `FakeHub` that listens on a port of its own until the block ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self._body()
            status, content = 404, {"error": f"no {self.command} {self.path}"}
            for kind, method, pattern in ROUTES:
                match = re.fullmatch(pattern, self.path.partition("?")[0])
                if match and method == self.command:
                    status, content = hub.handle(kind, match, body)
                    break
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *args):
            pass

        do_GET = do_POST = do_PUT = do_HEAD = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
