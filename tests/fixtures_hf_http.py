"""How the hub of `fixtures_hf` answers each request of the vendor's clients."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests.fixtures_hf import LARGE, Blob, Hub, Repo, Request

_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
_API = re.compile(rf"/api/(?P<kind>model|dataset)s/{_ID}(?:/(?P<verb>[a-z-]+)(?:/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?)?")
LICENSES = ("apache-2.0", "mit", "llama3.1", "other")
"""Some of the identifiers that the Hub takes in a card."""
_VERBS = ("revision", "tree", "paths-info", "preupload", "commit", "refs", "auth-check")
_FILE = re.compile(rf"/(?P<kind>dataset)?s?/?{_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
_LFS = re.compile(rf"/(?P<kind>dataset)?s?/?{_ID}\.git/info/lfs/objects/batch")
_XET = re.compile(rf"/api/(?P<kind>model|dataset)s/{_ID}/xet-(?P<may>read|write)-token/(?P<rev>[^/]+)")


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cut: int | None = None
        with self.hub.lock:
            try:
                self.ask()
            except Refused as refused:
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
                told = {name: value for name, value in headers.items() if value}
                self.reply(json.dumps({"error": refused.message}).encode(), refused.status, told)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send(*self.answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def ask(self) -> None:
        hub, parts, sent = self.hub, urlsplit(self.path), self.headers.get("Authorization")
        self.query = parse_qs(parts.query)
        hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), sent is not None))
        for fault in hub.faults:
            if fault.times and fault.match in f"{self.command} {self.path}":
                fault.times -= 1
                self.cut = fault.cut
                if fault.status:
                    return self.reply(b"{}", fault.status, fault.headers)
                break
        self.user = hub.users.get((sent or "").removeprefix("Bearer "))
        if sent and self.user is None:
            raise Refused(401, message="Invalid credentials in Authorization header")
        self.route(parts.path)

    def route(self, path: str) -> None:
        if path.startswith("/cdn/"):
            return self.bytes_of(self.hub.blobs[path.split("/")[2]], {"ETag": f'"{path.split("/")[2]}"'})
        if path.startswith("/lfs/"):
            self.hub.blobs[hashlib.sha256(self.body).hexdigest()] = self.body
            return self.reply(b"")
        if path == "/api/whoami-v2":
            if self.user is None:
                raise Refused(401, message="Invalid username or password.")
            return self.json(
                {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            )
        if path == "/api/validate-yaml":
            named = re.search(r"^license: (.+)$", json.loads(self.body)["content"], re.MULTILINE)
            if named and named[1] not in LICENSES:
                wrong = {"message": '"license" must be one of ' + ", ".join(LICENSES)}
                return self.json({"errors": [wrong], "warnings": []}, 400)
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        for pattern, answer in ((_XET, self.xet), (_LFS, self.lfs), (_FILE, self.file)):
            if found := pattern.fullmatch(path):
                return answer(**{name: unquote(part or "") for name, part in found.groupdict().items()})
        found = _API.fullmatch(path)
        if found and found["verb"] and found["verb"] not in _VERBS:  # the verb is the name's second part
            found = re.fullmatch(rf"/api/(?P<kind>model|dataset)s/{_ID}(?P<verb>)(?P<rev>)(?P<path>)", path)
        if not found:
            raise Refused(404, message="no such page")
        parts = {name: unquote(part or "") for name, part in found.groupdict().items()}
        repo = self.repo(parts["kind"], parts["id"], write=parts["verb"] == "commit")
        verb: Callable[..., None] = getattr(self, "api_" + (parts["verb"] or "revision").replace("-", "_"))
        verb(repo, parts["rev"] or "main", parts["path"])

    # -- repositories -----------------------------------------------------------------------------------------------

    def repo(self, kind: str, name: str, *, write: bool = False, files: bool = False) -> Repo:
        repo = self.hub.repos.get((kind or "model", name))
        if repo is None or (repo.private and self.user not in repo.readers):
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != name.split("/")[0]:
            raise Refused(403, message="You don't have the required permissions")
        if files and repo.gated and self.user not in repo.readers:
            raise Refused(403 if self.user else 401, "GatedRepo", f"Access to model {name} is restricted.")
        return repo

    def at(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        found = repo.files(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def create(self, asked: dict[str, Any]) -> None:
        kind, owner = asked.get("type") or "model", asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        if self.user is None or owner != self.user:
            raise Refused(403, message=f"You don't have the rights to create a {kind} under the namespace {owner}")
        known = (kind, name) in self.hub.repos
        if not known:
            self.hub.create(name, kind, asked.get("visibility") == "private" or bool(asked.get("private")), owner)
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        self.json({"url": url, "name": name, "error": "You already created this repo"}, 409 if known else 200)

    def api_revision(self, repo: Repo, revision: str, _: str) -> None:
        commit, files = self.at(repo, revision)
        front = re.match(
            rb"---\n(.*?)\n---", self.hub.blobs[files["README.md"].sha256] if "README.md" in files else b"", re.S
        )
        card = yaml.safe_load(front[1]) if front else {}
        tags = [f"license:{card['license']}"] if "license" in card else []
        told = {
            "_id": "0",
            "id": repo.id,
            "sha": commit,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
        }
        names = {} if "expand" in self.query else {"siblings": [{"rfilename": path} for path in files]}
        self.json({**told, "cardData": card, "tags": tags, "downloads": 0, "likes": 0, **names})

    def api_auth_check(self, repo: Repo, *_: str) -> None:
        self.repo(repo.kind, repo.id, files=True)
        self.json({})

    def api_refs(self, repo: Repo, *_: str) -> None:
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in repo.refs.items()]
        self.json({"branches": branches, "tags": [], "converts": []})

    def api_tree(self, repo: Repo, revision: str, folder: str) -> None:
        _, files = self.at(repo, revision)
        prefix = f"{folder}/" if folder else ""
        below = {path: blob for path, blob in files.items() if path.startswith(prefix)}
        if folder and not below:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        entries: dict[str, dict[str, Any]] = {}
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        for path, blob in below.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                entries[path] = blob.entry(path)
        start, size = int(self.query.get("cursor", ["0"])[0]), self.hub.page_size
        page = list(entries.values())[start : start + size]
        page += [
            Blob("0" * 64, 1, "0" * 40, False).entry(f"{at}.json")
            for at in range(start, min(start + size, repo.endless))
        ]
        more = start + size < max(len(entries), repo.endless)
        after = f"{self.hub.url}{self.path.split('?')[0]}?recursive={str(recursive).lower()}&cursor={start + size}"
        self.json(page, headers={"Link": f'<{after}>; rel="next"'} if more else {})

    def api_paths_info(self, repo: Repo, revision: str, _: str) -> None:
        _, files = self.at(repo, revision)
        asked = json.loads(self.body) if self.body[:1] == b"{" else parse_qs(self.body.decode())
        told = [files[path].entry(path) for path in asked["paths"] if path in files]
        folders = [path for path in asked["paths"] if any(name.startswith(f"{path}/") for name in files)]
        self.json(told + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders])

    # -- files ------------------------------------------------------------------------------------------------------

    def file(self, kind: str, id: str, rev: str, path: str) -> None:
        repo = self.repo(kind, id, files=True)
        commit, files = self.at(repo, rev)
        if path not in files:
            raise Refused(404, "EntryNotFound", f"{path} does not exist")
        blob = files[path]
        data = self.hub.served.get((id, path), self.hub.blobs.get(blob.sha256))
        tag = blob.sha256 if blob.large else blob.oid
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}
        if data is not None and not blob.large:
            return self.bytes_of(data, headers)
        headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(blob.size if data is None else len(data))}
        if xet := self.hub.xet_hashes().get(blob.sha256):
            route = f"{self.hub.url}/api/{repo.kind}s/{id}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": xet, "Link": f'<{route}>; rel="xet-auth"'}
        if data is None:  # it came through xet, and lies in its store alone
            return self.reply(b"", 302, {**headers, "Location": f"{self.hub.store_url}/gone"})
        served = hashlib.sha256(data).hexdigest()
        self.hub.blobs[served] = data
        signed = f"{self.hub.store_url}/cdn/{served}/{quote(path)}?Signature=secret"
        self.reply(b"", 302, {**headers, "Location": signed})

    def bytes_of(self, data: bytes, headers: Mapping[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.reply(data, 200, {**headers, "Accept-Ranges": "bytes"})
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self.reply(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
        self.reply(data[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def xet(self, kind: str, id: str, may: str, rev: str) -> None:
        self.repo(kind, id, write=may == "write", files=True)
        if self.hub.store is None:
            raise Refused(404, message="xet is not spoken here")
        told = {"casUrl": f"local://{self.hub.store}", "accessToken": "xet", "exp": int(time.time()) + 3600}
        names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
        self.json(told, headers=dict(zip(names, map(str, told.values()), strict=True)))

    # -- commits ----------------------------------------------------------------------------------------------------

    def api_preupload(self, repo: Repo, revision: str, _: str) -> None:
        _, files = self.at(repo, revision)
        told = []
        for asked in json.loads(self.body)["files"]:
            path, size = asked["path"], asked["size"]
            large = path.endswith(LARGE) or size > 10_000_000
            known = files.get(path)
            oid = {"oid": known.sha256 if known.large else known.oid} if known else {}
            told.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **oid})
        self.json({"files": told})

    def lfs(self, kind: str, id: str) -> None:
        self.repo(kind, id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.blobs else {"actions": upload})})
        self.json({"transfer": "basic", "objects": objects})

    def api_commit(self, repo: Repo, revision: str, _: str) -> None:
        head, files = self.at(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != head:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = self.hub.blob(path, base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs and not self.hub.store:
                    raise Refused(400, message=f"the LFS object of {path} was not uploaded")
                files[path] = Blob(value["oid"], value["size"], value["oid"][:40], True)
            elif line["key"] == "deletedFile":
                del files[path]
        commit = repo.commit(files, revision)
        self.json({"commitUrl": f"{self.hub.url}/{repo.id}/commit/{commit}", "commitOid": commit, "success": True})

    # -- answers ----------------------------------------------------------------------------------------------------

    def json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.reply(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def reply(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer = (data, status, dict(headers or {}))

    def send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is None or self.cut >= len(data):
            self.wfile.write(data)
            return
        self.wfile.write(data[: self.cut])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
