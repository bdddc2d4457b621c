"""A Hub on this machine, as far as huggingface_hub asks it for models: repositories with commits, branches, tokens.

Everything is in memory. `Hub` is the state, which tests look at and spoil; `serve` answers requests in a thread.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_writer": ("owner", "write"), "hf_reader": ("owner", "read"), "hf_stranger": ("stranger", "write")}
MODEL = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repository:
    """Commits by their identity, each with all of its files, and what branches point at."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {})

    def commit(self, branch, files):
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def at(self, revision):
        return self.branches.get(revision, revision)

    def files(self, revision="main"):
        return self.commits[self.at(revision)]


@dataclass
class Hub:
    """What is on it, what it was asked, and how many uploads of large files it lets through."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    uploads_left: float = float("inf")
    url: str = ""


class Refusal(Exception):
    def __init__(self, status, code=None, message="", url=""):
        self.status, self.code, self.message, self.url = status, code, message, url


def serve():
    """A Hub that answers at ``hub.url``; returns it and what ends it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return hub, server.shutdown


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.read_body()
        self.hub.asked.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for wanted, pattern, reply in ROUTES:
                found = re.fullmatch(pattern, path)
                if wanted == method and found:
                    return self.send(*reply(self, body, **found.groupdict()))
            raise Refusal(404, "EntryNotFound", f"{method} {path} is not served")
        except Refusal as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            content = {"error": refused.message, "url": refused.url}
            self.send(content, {**headers, "X-Error-Message": refused.message}, refused.status)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def send(self, content, headers=None, status=200):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- who asks, and for what ------------------------------------------------------------------------------------

    @property
    def who(self):
        """User and role; nobody without a token."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return TOKENS.get(given, (None, None))

    def readable(self, repo):
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self.who[0] != repo.split("/")[0]):
            raise Refusal(401 if self.who[0] is None else 404, "RepoNotFound", "Repository not found")
        return found

    def writable(self, repo):
        found = self.readable(repo)
        if self.who != (repo.split("/")[0], "write"):
            raise Refusal(403, None, "You have read access but not the required permissions for this operation")
        return found

    # -- answers ---------------------------------------------------------------------------------------------------

    def whoami(self, _):
        user, role = self.who
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        return ({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}},)

    def create(self, body):
        asked = json.loads(body)
        owner = asked.get("organization") or self.who[0]
        repo = f"{owner}/{asked['name']}"
        if self.who != (owner, "write"):
            raise Refusal(403, None, f"You don't have the rights to create a model under the namespace {owner}")
        if repo in self.hub.repositories:
            raise Refusal(409, None, "You already created this model repo", f"{self.hub.url}/{repo}")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo] = Repository(private)
        return ({"url": f"{self.hub.url}/{repo}"},)

    def info(self, _, repo, revision="main"):
        found = self.readable(repo)
        sha = found.at(revision)
        if sha not in found.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": name} for name in sorted(found.commits[sha])]
        return ({"id": repo, "sha": sha, "private": found.private, "tags": [], "siblings": siblings},)

    def tree(self, _, repo, revision, under=""):
        files = self.readable(repo).commits.get(self.readable(repo).at(revision))
        if files is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        rows = [described(name, data) for name, data in sorted(files.items()) if name.startswith(under)]
        if not rows and under:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        return (rows,)

    def refs(self, _, repo):
        branches = self.readable(repo).branches.items()
        rows = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        return ({"branches": rows, "tags": [], "converts": []},)

    def branch(self, _, repo, revision):
        found = self.writable(repo)
        found.branches.setdefault(revision, found.at("main"))
        return ({},)

    def resolve(self, _, repo, revision, name):
        found = self.readable(repo)
        sha = found.at(revision)
        if sha not in found.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in found.commits[sha]:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        data = found.commits[sha][name]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return data, headers
        begin, end = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
        part = data[begin:end]
        return part, {**headers, "Content-Range": f"bytes {begin}-{begin + len(part) - 1}/{len(data)}"}, 206

    def preupload(self, body, repo, revision):
        self.writable(repo)
        files = json.loads(body)["files"]
        mode = {True: "lfs", False: "regular"}
        return (
            {
                "files": [
                    {"path": f["path"], "shouldIgnore": False, "uploadMode": mode[f["path"].endswith(".safetensors")]}
                    for f in files
                ]
            },
        )

    def batch(self, body, repo):
        self.writable(repo)
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def upload(self, body, oid):
        self.hub.uploads_left -= 1
        if self.hub.uploads_left < 0:
            raise Refusal(403, None, "the line was cut")
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        return (b"",)

    def commit(self, body, repo, revision):
        found = self.writable(repo)
        files = dict(found.files(revision))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        return ({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""},)

    def paths(self, body, repo, revision):
        files = self.readable(repo).files(revision)
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            wanted = [unquote(part.partition("=")[2]) for part in body.decode().split("&") if part.startswith("paths=")]
        return ([described(name, files[name]) for name in wanted if name in files],)


def described(name, data):
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", lambda *_: ({"errors": [], "warnings": []},)),
    ("GET", f"/api/models/{MODEL}", Handler.info),
    ("GET", f"/api/models/{MODEL}/revision/(?P<revision>.+)", Handler.info),
    ("GET", f"/api/models/{MODEL}/tree/(?P<revision>[^/]+)/?(?P<under>.*)", Handler.tree),
    ("GET", f"/api/models/{MODEL}/refs", Handler.refs),
    ("POST", f"/api/models/{MODEL}/branch/(?P<revision>.+)", Handler.branch),
    ("POST", f"/api/models/{MODEL}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", f"/api/models/{MODEL}/paths-info/(?P<revision>.+)", Handler.paths),
    ("POST", f"/api/models/{MODEL}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/{MODEL}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("GET", f"/{MODEL}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
)
