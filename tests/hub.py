"""A Hub on 127.0.0.1 for tests: it speaks the HTTP API of the Hugging Face Hub to the real client and fails when told."""

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import warnings
from collections import namedtuple
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNED = ("tester", "lab")  # the user of the tokens and an organization of theirs
LFS_NAME = re.compile(r"\.(safetensors|bin|pt|pth|png)$")
LFS_SIZE = 10_000  # bytes; the Hub's is 10 MB

MODEL = "/api/models/{repo}"
ROUTES = [  # method, path, what the token must be allowed to do with the repository, the method of Hub that answers
    ("GET", "/api/whoami-v2", None, "whoami"),
    ("POST", "/api/repos/create", None, "create"),
    ("POST", "/api/validate-yaml", None, "validate"),
    ("GET", MODEL + "/auth-check", "content", "nothing"),
    ("GET", MODEL + "/auth-check/write", "write", "nothing"),
    ("GET", MODEL, "read", "info"),
    ("GET", MODEL + "/revision/{revision}", "read", "info"),
    ("GET", MODEL + "/tree/{revision}", "read", "tree"),
    ("GET", MODEL + "/tree/{revision}/{path}", "read", "tree"),
    ("GET", MODEL + "/refs", "read", "refs"),
    ("GET", MODEL + "/commits/{revision}", "read", "commits"),
    ("POST", MODEL + "/branch/{branch}", "write", "add_branch"),
    ("POST", MODEL + "/preupload/{revision}", "write", "preupload"),
    ("POST", "/{repo}.git/info/lfs/objects/batch", "write", "batch"),
    ("PUT", "/lfs/{oid}", None, "store"),
    ("POST", "/lfs/verify", None, "verify"),
    ("POST", MODEL + "/commit/{branch}", "write", "commit"),
    ("GET", "/{repo}/resolve/{revision}/{path}", "content", "resolve"),
]
SEGMENTS = {"{repo}": r"(?P<name>[^/]+/[^/]+)", "{path}": "(?P<path>.+)"}
PATTERNS = [
    re.compile(re.sub(r"{(\w+)}", lambda m: SEGMENTS.get(m[0], rf"(?P<{m[1]}>[^/]+)"), path))
    for _, path, _, _ in ROUTES
]

# The answers that a fault can force: status, message and X-Error-Code, in the Hub's words.
FAULTS = {
    "401": (401, "Invalid credentials in Authorization header"),
    "404": (404, "Repository not found", "RepoNotFound"),
    "500": (500, "Internal Error - We're working hard to fix this as soon as possible!"),
    "503": (503, "Service Unavailable"),
    "quota": (403, "Private repository storage limit reached, please upgrade your plan to increase it."),
}
PLACES = {"quota": "/objects/batch$", "cut": "^PUT ", "truncate": "^PUT "}  # where faults strike by default

# status 0: closed without an answer; received: bytes of the request's body
Call = namedtuple("Call", "method path status received")


class HubError(Exception):
    def __init__(self, status, message, code=None, headers=None, **more):
        named = {"X-Error-Message": message, "X-Error-Code": code}
        self.status, self.headers = status, {k: v for k, v in named.items() if v} | (headers or {})
        self.body = json.dumps({"error": message, **more}).encode()


@dataclass
class File:
    data: bytes
    lfs: bool

    def __post_init__(self):
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = text.encode() if self.lfs else self.data
        self.blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.etag = self.sha256 if self.lfs else self.blob
        pointer = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": len(text)}
        self.entry = {"size": len(self.data), "oid": self.blob, "lfs": pointer if self.lfs else None}


@dataclass
class Commit:
    files: dict
    title: str
    message: str = ""
    parent: "Commit | None" = None
    oid: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()))


class Repo:
    def __init__(self, files, private, gated):
        self.private, self.gated, self.branches, self.commits = private, gated, {}, {}
        self.add("main", Commit(files, "initial commit"))

    def add(self, branch, commit):
        self.branches[branch] = self.commits[commit.oid] = commit

    def at(self, revision):
        for commits in (self.branches, self.commits):
            if revision in commits:
                return commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def goes_to_lfs(path, size):
    return size > LFS_SIZE or (size > 0 and bool(LFS_NAME.search(path)))


def front_matter(card):
    """The metadata of a model card, or None without any."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


class Hub:
    """`with Hub() as hub:` listens on a free port.

    Attributes:
        token: Write token of user "tester", a member of organization "lab".
        read_token: Read token of the same user.
        log: Every request so far, as Call.
    """

    def __init__(self):
        self.token, self.read_token = ("hf_" + secrets.token_hex(17) for _ in range(2))
        self.repos, self.objects, self.log = {}, {}, []
        self._faults, self._lock, self._port, self._server = [], threading.Lock(), 0, None

    def __enter__(self):
        self.up()
        return self

    def __exit__(self, *_):
        self.down()

    def up(self):
        """Listens; after down() on the same port."""
        self._server = Server(("127.0.0.1", self._port), Handler)
        self._server.hub, self._port = self, self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def down(self):
        """Refuses connections, drops those that are open, and keeps what is stored."""
        with self._lock:
            server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()
            for connection in list(server.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    start, stop = up, down

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    @property
    def uploaded_bytes(self):
        """Bytes that LFS uploads have sent."""
        return sum(call.received for call in self.seen("^PUT "))

    def files(self, repo_id, revision="main"):
        return {path: file.data for path, file in self.repos[repo_id].at(revision).files.items()}

    def add_repo(self, repo_id, files=(), private=False, gated=False):
        """A repository with these bytes by path; outside of the namespaces in OWNED the tokens can only read."""
        kept = {path: File(data, goes_to_lfs(path, len(data))) for path, data in dict(files).items()}
        self.repos[repo_id] = Repo(kept, private, gated)

    def seen(self, pattern=""):
        """The requests whose "METHOD path" has the regular expression."""
        return [call for call in self.log if re.search(pattern, f"{call.method} {call.path}")]

    def fault(self, kind, *, times=None, match=None, after=0, seconds=0.0, rate=None):
        """Makes the next requests fail, until clear().

        Args:
            kind: A key of FAULTS, "slow" (`seconds` before each answer, or `rate` bytes per second of each body),
                "cut" (closes the connection halfway through the body of the request, or of the answer to a GET),
                "lost" (does what was asked and closes without an answer), "truncate" (stores half of each file and
                answers 200) or "down" (goes down when the request arrives; at once without `match`).
            times: How many requests; all of them if None.
            match: Regular expression on "METHOD path"; PLACES has the defaults.
            after: How many matching requests go well before.
        """
        assert kind in {*FAULTS, "slow", "cut", "lost", "truncate", "down"}, kind
        if kind == "down" and match is None:
            return self.down()
        match = match or PLACES.get(kind, "")
        self._faults.append(
            SimpleNamespace(kind=kind, times=times, match=match, after=after, seconds=seconds, rate=rate)
        )

    def clear(self):
        self._faults.clear()

    def due(self, line):
        """The fault of a request, if any."""
        with self._lock:
            for fault in self._faults:
                if fault.times != 0 and re.search(fault.match, line):
                    if fault.after == 0:
                        fault.times = fault.times and fault.times - 1
                        return fault
                    fault.after -= 1
        return SimpleNamespace(kind=None, seconds=0, rate=None)

    def answer(self, method, target, sent, body, truncate):
        """Status, headers and body."""
        parts = urlsplit(target)
        verb = method.replace("HEAD", "GET")
        matches = (
            (r, m) for r, p in zip(ROUTES, PATTERNS, strict=True) if r[0] == verb and (m := p.fullmatch(parts.path))
        )
        (_, _, right, name), found = next(matches, ((None,) * 4, None))
        if found is None:
            raise HubError(404, f"Cannot {method} {parts.path}")
        token = sent.get("Authorization", "").removeprefix("Bearer ") or None
        asked = SimpleNamespace(
            revision="main", path="", query=parse_qs(parts.query), sent=sent, body=body, truncate=truncate
        )
        vars(asked).update({key: unquote(value) for key, value in found.groupdict().items()})
        if token not in (None, self.token, self.read_token):
            raise HubError(*FAULTS["401"])
        asked.role = {None: None, self.token: "write", self.read_token: "read"}[token]
        with self._lock:
            asked.repo = self._repo(asked.name, asked.role, right) if right else None
            made = getattr(self, f"_{name}")(asked)
        return made if isinstance(made, tuple) else (200, {}, json.dumps(made).encode())

    def _repo(self, name, role, right):
        repo, owned = self.repos.get(name), role and name.split("/")[0] in OWNED
        if repo is None or ((repo.private or right == "write") and not role) or (repo.private and not owned):
            status, message = (404, "Repository not found") if role else (401, "Invalid username or password.")
            raise HubError(status, message, "RepoNotFound")
        if right == "write" and not (owned and role == "write"):
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository")
        if right == "content" and repo.gated and not owned:
            raise HubError(403 if role else 401, f"Access to model {name} is restricted", "GatedRepo")
        return repo

    def _nothing(self, asked):
        return {}

    def _whoami(self, asked):
        if asked.role is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": asked.role}}
        return {"type": "user", "name": OWNED[0], "orgs": [{"type": "org", "name": OWNED[1]}], "auth": auth}

    def _create(self, asked):
        new = json.loads(asked.body)
        namespace = new.get("organization") or OWNED[0]
        if asked.role is None:
            raise HubError(401, "Invalid username or password.")
        if asked.role != "write" or namespace not in OWNED:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        name = f"{namespace}/{new['name']}"
        if name in self.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.url}/{name}")
        self.add_repo(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, new.get("visibility") == "private")
        return {"url": f"{self.url}/{name}", "name": name}

    def _validate(self, asked):
        try:
            known = front_matter(json.loads(asked.body)["content"])
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": [] if known else [{"message": "empty or missing yaml metadata in repo card"}]}

    def _info(self, asked):
        commit, blobs = asked.repo.at(asked.revision), "blobs" in asked.query
        siblings = [
            {"rfilename": path, **({**file.entry, "blobId": file.blob} if blobs else {})}
            for path, file in commit.files.items()
        ]
        card = front_matter(commit.files["README.md"].data.decode()) if "README.md" in commit.files else None
        state = {"private": asked.repo.private, "gated": asked.repo.gated, "siblings": siblings, "cardData": card}
        return {"id": asked.name, "sha": commit.oid, "lastModified": commit.date, **state}

    def _tree(self, asked):
        start = f"{asked.path.strip('/')}/" if asked.path else ""
        files = {path: f for path, f in asked.repo.at(asked.revision).files.items() if path.startswith(start)}
        if start and not files:
            raise HubError(404, f"{asked.path} does not exist on {asked.revision}", "EntryNotFound")
        deep = asked.query["recursive"] == ["true"]
        shown = {path: f for path, f in files.items() if deep or "/" not in path.removeprefix(start)}
        return [{"type": "file", "path": path, **f.entry} for path, f in shown.items()]

    def _refs(self, asked):
        heads = asked.repo.branches.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": head.oid} for name, head in heads]
        return {"branches": branches, "tags": [], "converts": []}

    def _commits(self, asked):
        commit, found = asked.repo.at(asked.revision), []
        while commit:
            text = {"title": commit.title, "message": commit.message}
            found.append({"id": commit.oid, **text, "date": commit.date, "authors": [{"user": OWNED[0]}]})
            commit = commit.parent
        return found

    def _add_branch(self, asked):
        if asked.branch in asked.repo.branches:
            raise HubError(409, f"Reference already exists: {asked.branch}")
        start = json.loads(asked.body).get("startingPoint", "main")
        asked.repo.branches[asked.branch] = asked.repo.at(start)
        return {}

    def _preupload(self, asked):
        files, modes = asked.repo.at(asked.revision).files, []
        for new in json.loads(asked.body)["files"]:
            mode = "lfs" if goes_to_lfs(new["path"], new["size"]) else "regular"
            known = {"oid": files[new["path"]].etag} if new["path"] in files else {}
            modes.append({"path": new["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": modes}

    def _batch(self, asked):
        objects = json.loads(asked.body)["objects"]
        for new in objects:
            if hashlib.sha256(self.objects.get(new["oid"], b"")).hexdigest() != new["oid"]:
                upload, verify = {"href": f"{self.url}/lfs/{new['oid']}"}, {"href": f"{self.url}/lfs/verify"}
                new["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def _store(self, asked):
        self.objects[asked.oid] = asked.body[: len(asked.body) // 2] if asked.truncate else asked.body
        return {}

    def _verify(self, asked):
        if json.loads(asked.body)["oid"] not in self.objects:
            raise HubError(404, "Object does not exist")
        return {}

    def _commit(self, asked):
        head = asked.repo.branches.get(asked.branch)
        if head is None:
            raise HubError(404, f"Invalid rev id: {asked.branch}", "RevisionNotFound")
        (_, header), *operations = (json.loads(line).values() for line in asked.body.splitlines())
        if header.get("parentCommit", head.oid) != head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for kind, value in operations:
            self._apply(files, kind, value, asked.truncate)
        commit = Commit(files, header["summary"], header["description"], head)
        asked.repo.add(asked.branch, commit)
        return {"commitOid": commit.oid, "commitUrl": f"{self.url}/{asked.name}/commit/{commit.oid}"}

    def _apply(self, files, kind, value, truncate):
        path = value["path"]
        if kind == "file":
            data = base64.b64decode(value["content"])
            files[path] = File(data[: len(data) // 2] if truncate else data, lfs=False)
        elif kind == "lfsFile":
            if value["oid"] not in self.objects:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(self.objects[value["oid"]], lfs=True)
        else:
            folder = path.rstrip("/") + "/" if kind == "deletedFolder" else None
            gone = [p for p in files if p == path or (folder and p.startswith(folder))]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for old in gone:
                del files[old]

    def _resolve(self, asked):
        commit = asked.repo.at(asked.revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if asked.path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[asked.path]
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": len(file.data)} if file.lfs else {}
        headers |= linked | {"ETag": f'"{file.etag}"'}
        if not (span := re.fullmatch(r"bytes=(\d+)-", asked.sent.get("Range", ""))):
            return 200, headers, file.data
        start, size = int(span[1]), len(file.data)
        return 206, {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}, file.data[start:]


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, *arguments):
        self.connections = set()
        super().__init__(*arguments)

    def handle_error(self, *arguments):
        if not isinstance(sys.exception(), OSError):  # a connection that the client or a fault has cut
            super().handle_error(*arguments)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60  # seconds that an idle connection is kept

    def setup(self):
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self):
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def answer(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        fault = hub.due(f"{self.command} {path}")
        if fault.kind == "down":
            return hub.down()
        length, cut = int(self.headers.get("Content-Length", 0)), fault.kind == "cut"
        body = b"".join(self.pieces(self.rfile, length // 2 if cut else length, fault.rate))
        made = None if cut and length else self.make(fault, body)
        time.sleep(fault.seconds)
        made = None if fault.kind == "lost" else made
        hub.log.append(Call(self.command, path, made[0] if made else 0, len(body)))
        if made:
            self.send(*made, cut, fault.rate)
        self.close_connection |= cut or not made

    def make(self, fault, body):
        try:
            if fault.kind in FAULTS:
                raise HubError(*FAULTS[fault.kind])
            return self.server.hub.answer(self.command, self.path, self.headers, body, fault.kind == "truncate")
        except HubError as error:
            return error.status, error.headers, error.body

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def pieces(self, stream, length, rate):
        size = max(1, int(rate / 20)) if rate else 1 << 20
        while length and (piece := stream.read(min(size, length))):
            time.sleep(len(piece) / rate if rate else 0)
            length -= len(piece)
            yield piece

    def send(self, status, headers, data, cut, rate):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            for piece in self.pieces(io.BytesIO(data), len(data) // 2 if cut else len(data), rate):
                self.wfile.write(piece)


def hub_environment(hub, home):
    """The environment of a child process whose Hub this is, with its cache under the folder `home`."""
    kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith(("HF_", "HUGGING"))}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **switches, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(home)}


@contextlib.contextmanager
def pointed_at(hub, monkeypatch, home):
    """Points the client of this process at the Hub, with the write token and a cache under the folder `home`."""
    import transformers.utils.hub
    from huggingface_hub import close_session, constants, hf_api

    values = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}"}
    values |= {"HF_HOME": str(home), "HF_HUB_CACHE": os.path.join(home, "hub")}
    values |= {"HF_TOKEN_PATH": os.path.join(home, "token")}
    values |= {"HF_STORED_TOKENS_PATH": os.path.join(home, "stored_tokens"), "HF_HUB_OFFLINE": False}
    values |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
    with monkeypatch.context() as patch, warnings.catch_warnings():
        # the client's own LFS upload passes the file as data=
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        for name, value in values.items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", hub.url)  # what the functions of huggingface_hub are bound to
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # made on first use, with the endpoint of then
        patch.setenv("HF_TOKEN", hub.token)
        for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
            patch.delenv(name)
        close_session()
        try:
            yield
        finally:
            close_session()
