"""The Hugging Face Hub in a thread: enough of its protocol for the real client, and faults on demand.

Models only. Files of git are those that the Hub keeps there (text, small); the others go through LFS: batch, upload,
verify, and, coming down, a redirect to a content delivery network, which is this server under another host name, so
that the client takes it for a stranger. Of Xet, which the client prefers, there is only what the Hub itself says of
it, `Hub.xet`: the storage behind is hf_xet's own, so tests put something in its place, or tell the client not to use
it.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard


@dataclass
class User:
    """Whom a token belongs to, and what it may do."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)  # name -> role in it
    scopes: dict[str, list[str]] | None = None  # of a fine-grained token: name -> permissions

    def may_read(self, repo: str) -> bool:
        return repo.split("/")[0] in {self.name, *self.orgs}

    def may_write(self, repo: str) -> bool:
        namespace = repo.split("/")[0]
        if self.scopes is not None:
            return any("repo.write" in self.scopes.get(name, []) for name in (namespace, repo))
        return self.role == "write" and (namespace == self.name or self.orgs.get(namespace) in ("admin", "write"))

    def whoami(self) -> dict[str, Any]:
        token: dict[str, Any] = {"displayName": "test", "role": self.role}
        if self.scopes is not None:
            scoped = [{"entity": {"name": name}, "permissions": allowed} for name, allowed in self.scopes.items()]
            token |= {"role": "fineGrained", "fineGrained": {"global": [], "scoped": scoped}}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        return {"type": "user", "name": self.name, "orgs": orgs, "auth": {"accessToken": token}}


@dataclass
class Entry:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        git = b"blob %d\0" % len(self.content) + self.content
        return hashlib.sha256(self.content).hexdigest() if self.lfs else hashlib.sha1(git).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Entry], message: str = "initial commit") -> str:
        made = repr((len(self.commits), message, sorted((path, entry.etag) for path, entry in files.items())))
        sha = hashlib.sha1(made.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def sha(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None


@dataclass
class Fault:
    """What happens to the next `times` requests that match, instead of the right answer."""

    match: str  # regular expression for "METHOD path"
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    # "cut": closed after half; "short": half, said to be all; "wrong": another last byte; "page": HTML
    body: str | None = None
    delay: float = 0.0  # seconds


class Hub:
    """The server; use it as a context manager. `requests` records "METHOD path" of all that came in."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}  # by token
        self.lfs: dict[str, bytes] = {}
        self.collections: dict[str, list[tuple[str, str]]] = {}  # by slug: type and name of each item
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.RLock()
        self.cache, self.waits = Path(), None  # of the client, set by the fixture
        self.xet = False  # whether large files are offered by Xet too, under the hash `xet_hash`
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}/cdn"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> Repo:
        """Put a repository there without the client."""
        repo = self.repos[name] = Repo(**settings)
        repo.commit("main", {path: Entry(content, is_lfs(path, len(content))) for path, content in files.items()})
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return {path: entry.content for path, entry in repo.commits[repo.sha(revision) or ""].items()}

    def take_fault(self, request: str) -> Fault | None:
        for fault in [fault for fault in self.faults if fault.times and re.search(fault.match, request)][:1]:
            fault.times -= 1
            return fault
        return None


def is_lfs(path: str, size: int) -> bool:
    """As the Hub's default .gitattributes say, and what is binary or large."""
    return bool(re.search(r"\.(safetensors|bin|pt|pkl|npz|zip)$", path)) or size > 10 << 20


def xet_hash(content: bytes) -> str:
    """The name of a content in Xet's storage: not the checksum by which the Hub knows it."""
    return hashlib.sha256(b"xet" + content).hexdigest()


class Refused(Exception):
    """An answer that is an error, with the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    fault: Fault | None = None

    def log_message(self, *_: object) -> None: ...

    def _serve(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {path}"
        with hub.lock:
            hub.requests.append(request)
            hub.headers.append({key.lower(): value for key, value in self.headers.items()})
            self.fault = hub.take_fault(request)
        try:
            if self.fault is not None:
                time.sleep(self.fault.delay)
                if self.fault.status is not None:
                    raise Refused(self.fault.status, f"fault {self.fault.status}", headers=self.fault.headers)
            method = "GET" if self.command == "HEAD" else self.command
            for pattern, answer in _ROUTES.items():
                if found := re.fullmatch(pattern, f"{method} {path}"):
                    names = {key: unquote(value) for key, value in found.groupdict().items() if value}
                    with hub.lock:
                        reply = answer(self, **names)
                    return self._send(*reply) if isinstance(reply, tuple) else self._json(reply)
            raise Refused(404, "Sorry, we can't find the page you are looking for.")
        except Refused as error:
            self._json({"error": error.message}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.fault = self.fault if status < 400 else None
        self._send(status, {"Content-Type": "application/json"} | (headers or {}), json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        start, stop, total = 0, len(content), len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            start, stop = int(wanted[1]), min(total, int(wanted[2] or total) + bool(wanted[2]))
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{total}"}
        content = content[start:stop]
        damage = self.fault.body if self.fault and self.command == "GET" else None
        content = content[: len(content) // 2] if damage == "short" else content
        content = content[:-1] + bytes([content[-1] ^ 1]) if damage == "wrong" else content
        content = b"<html>Please log in</html>" if damage == "page" else content
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.close_connection |= damage == "cut"
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if damage == "cut" else content)

    def _user(self, needed: bool = False) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.users and (token or needed):
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _repo(self, name: str, write: bool = False, content: bool = False) -> Repo:
        repo, user = self.hub.repos.get(name), self._user()
        if repo is None or (repo.private and not (user and user.may_read(name))):
            # The Hub does not say whether a private repository exists.
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if content and repo.gated and not (user and user.may_read(name)):
            raise Refused(403 if user else 401, f"Access to model {name} is restricted", "GatedRepo")
        if write and not (user and user.may_write(name)):
            raise Refused(403 if user else 401, "You don't have the rights to write to this repository")
        return repo

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = repo.sha(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def _whoami(self) -> Any:
        return self._user(needed=True).whoami()

    def _create(self) -> Any:
        asked, user = json.loads(self.body), self._user(needed=True)
        name = f"{asked.get('organization') or user.name}/{asked['name']}"
        if not user.may_write(name):
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            return 409, {}, json.dumps(url | {"error": "You already created this model repo"}).encode()
        self.hub.add(name, {}, private=asked.get("visibility") == "private")
        return url

    def _list(self) -> Any:
        asked, user = parse_qs(urlsplit(self.path).query), self._user()
        author, wanted = asked.get("author", [""])[0], set(asked.get("filter", []))
        found = []
        for name, repo in self.hub.repos.items():
            card = repo.commits[repo.branches["main"]].get("README.md", Entry(b"", lfs=False)).content.decode()
            tags = ModelCard(card).data.tags or []
            seen = not repo.private or (user is not None and user.may_read(name))
            if name.startswith(f"{author}/") and wanted <= set(tags) and seen:
                found.append({"id": name, "private": repo.private, "tags": tags})
        return found

    def _collection(self, slug: str) -> Any:
        if slug not in self.hub.collections:
            raise Refused(404, "Collection not found")
        items = [
            {"_id": f"{position:024x}", "type": kind, "id": name, "position": position}
            for position, (kind, name) in enumerate(self.hub.collections[slug])
        ]
        owner, title = slug.split("/")
        told = {
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": False,
            "theme": "blue",
            "upvotes": 0,
        }
        return told | {"slug": slug, "title": title, "owner": {"name": owner}, "items": items}

    def _info(self, repo: str, revision: str = "main") -> Any:
        found = self._repo(repo)
        sha = self._sha(found, revision)
        return {"id": repo, "sha": sha, "private": found.private, "siblings": [], "tags": []}

    def _tree(self, repo: str, revision: str) -> Any:
        found = self._repo(repo)
        entries = found.commits[self._sha(found, revision)].items()
        return [{"type": "file", "path": path, "size": len(e.content), "oid": e.etag} for path, e in entries]

    def _branch(self, repo: str, branch: str) -> Any:
        found = self._repo(repo, write=True)
        if branch in found.branches:
            raise Refused(409, "Reference already exists")
        found.branches[branch] = self._sha(found, json.loads(self.body or b"{}").get("startingPoint", "main"))
        return {}

    def _tag(self, repo: str, revision: str) -> Any:
        found = self._repo(repo, write=True)
        found.tags[json.loads(self.body)["tag"]] = self._sha(found, revision)
        return {}

    def _validate_yaml(self) -> Any:
        license = ModelCard(json.loads(self.body)["content"]).data.license
        if license not in (None, "apache-2.0", "cc-by-nc-4.0", "mit", "other"):  # some of those that the Hub knows
            errors = [{"message": f'"license" must be one of [apache-2.0, ...], not {license}'}]
            return 400, {"Content-Type": "application/json"}, json.dumps({"errors": errors, "warnings": []}).encode()
        return {"errors": [], "warnings": []}

    def _preupload(self, repo: str, revision: str) -> Any:
        found = self._repo(repo, write=True)
        there = found.commits[self._sha(found, revision)]
        files = json.loads(self.body)["files"]
        for file in files:
            path, size = file["path"], file["size"]
            file |= {"uploadMode": "lfs" if is_lfs(path, size) else "regular", "shouldIgnore": False}
            file["oid"] = there[path].etag if path in there else None
        return {"files": files}

    def _batch(self, repo: str) -> Any:
        self._repo(repo, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs-verify"}}
        return {"transfer": "basic", "objects": objects}

    def _upload(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The SHA256 you specified did not match the calculated checksum.")
        self.hub.lfs[oid] = self.body
        return {}

    def _verify(self) -> Any:
        asked = json.loads(self.body)
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(400, "The object was not uploaded whole.")
        return {}

    def _commit(self, repo: str, revision: str) -> Any:
        found = self._repo(repo, write=True)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        parent = self._sha(found, revision)
        entries = dict(found.commits[parent])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                entries[value["path"]] = Entry(base64.b64decode(value["content"]), lfs=False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refused(400, "Your push was rejected because an LFS pointer pointed to a missing file.")
                entries[value["path"]] = Entry(self.hub.lfs[value["oid"]], lfs=True)
            else:
                del entries[value["path"]]
        sha = found.commit(revision, entries, header["value"]["summary"])
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"}

    def _resolve(self, repo: str, revision: str, path: str) -> Any:
        found = self._repo(repo, content=True)
        sha = self._sha(found, revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        entry = found.commits[sha].get(path)
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{entry.etag}"'
        if not entry.lfs:
            return 200, headers, entry.content
        self.hub.lfs[entry.etag] = entry.content
        linked = {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(len(entry.content))}
        if self.hub.xet:
            token = f"{self.hub.endpoint}/api/models/{repo}/xet-read-token/{sha}"
            linked |= {"X-Xet-Hash": xet_hash(entry.content), "X-Xet-Refresh-Route": token}
        return 302, headers | linked | {"Location": f"{self.hub.cdn}/{entry.etag}"}

    def _xet_token(self, repo: str, revision: str) -> Any:
        self._sha(self._repo(repo, content=True), revision)
        told = {"Cas-Url": f"{self.hub.endpoint}/xet", "Access-Token": "token", "Token-Expiration": "9999999999"}
        return 200, {f"X-Xet-{key}": value for key, value in told.items()}, b"{}"

    def _deliver(self, oid: str) -> Any:
        if oid not in self.hub.lfs:
            raise Refused(404, "NoSuchKey")
        return 200, {"ETag": f'"{oid[:32]}"', "Accept-Ranges": "bytes"}, self.hub.lfs[oid]


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", "(?P<revision>[^/]+)"
_ROUTES: dict[str, Callable[..., Any]] = {
    "GET /api/whoami-v2": _Handler._whoami,
    "POST /api/repos/create": _Handler._create,
    "GET /api/models": _Handler._list,
    r"GET /api/collections/(?P<slug>[\w.-]+/[\w.-]+)": _Handler._collection,
    f"GET /api/models/{_REPO}(/revision/{_REVISION})?": _Handler._info,
    f"GET /api/models/{_REPO}/tree/{_REVISION}(/.*)?": _Handler._tree,
    f"POST /api/models/{_REPO}/branch/(?P<branch>[^/]+)": _Handler._branch,
    f"POST /api/models/{_REPO}/tag/{_REVISION}": _Handler._tag,
    "POST /api/validate-yaml": _Handler._validate_yaml,
    f"POST /api/models/{_REPO}/preupload/{_REVISION}": _Handler._preupload,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": _Handler._batch,
    "PUT /lfs/(?P<oid>[0-9a-f]{64})": _Handler._upload,
    "POST /lfs-verify": _Handler._verify,
    f"POST /api/models/{_REPO}/commit/{_REVISION}": _Handler._commit,
    f"GET /{_REPO}/resolve/{_REVISION}/(?P<path>.+)": _Handler._resolve,
    f"GET /api/models/{_REPO}/xet-(read|write)-token/{_REVISION}": _Handler._xet_token,
    "GET /cdn/(?P<oid>[0-9a-f]{64})": _Handler._deliver,
}


def check_cache(hub: Hub) -> None:
    """Nothing in the cache is half of a file, or another file than its name says."""
    files = [path for path in hub.cache.rglob("*") if path.is_file()]
    assert not [path for path in files if "incomplete" in path.name]
    for path in files:
        if path.parent.name == "blobs":
            content = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            assert path.name in (git, hashlib.sha256(content).hexdigest())


def one_sentence(error: Any) -> str:
    """The text of what `pytest.raises` caught, which fits on a line."""
    text = str(error.value)
    assert "\n" not in text.strip() and "Traceback" not in text and len(text) < 400, text
    return text
