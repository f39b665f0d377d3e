"""A Hugging Face Hub on 127.0.0.1, for the vendor's own clients: repositories with commits, private, gated, LFS behind
a signed address on another port, ranges, listings in pages; and every way in which a hub fails, on request.

    with Hub() as hub:
        commit = hub.put("alice/tiny", {"config.json": b"{}"}, private=True)
        hub.use(monkeypatch, user="alice")  # HF_ENDPOINT, HF_TOKEN, and LFS in xet's place
        hub.fail("config.json", status=503, times=2)
"""

import hashlib
import json
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

LARGE = (".safetensors", ".bin", ".pt", ".gguf", ".parquet", ".model")


@dataclass
class Request:
    """What a client asked for. `token` is whether it sent one."""

    method: str
    path: str
    range: str | None
    token: bool


@dataclass
class Fault:
    """Happens to the next `times` requests whose method and path contain `match`."""

    match: str
    times: int
    status: int | None
    headers: Mapping[str, str]
    cut: int | None


@dataclass(frozen=True)
class Blob:
    sha256: str
    size: int
    oid: str
    large: bool

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": 134} if self.large else None
        return {"type": "file", "path": path, "size": self.size, "oid": self.oid, **({"lfs": lfs} if lfs else {})}


@dataclass
class Repo:
    id: str
    kind: str
    private: bool
    gated: bool
    readers: set[str]
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    endless: int = 0

    def files(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    def commit(self, files: dict[str, Blob], ref: str = "main") -> str:
        parent = self.refs.get(ref, "")
        tree = json.dumps([(path, files[path].sha256) for path in sorted(files)])
        oid = hashlib.sha1(f"{self.id} {parent} {len(self.commits)} {tree}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that went away in the middle is what some tests are about."""


class Hub:
    """Serves from `__enter__` to `__exit__`. With `xet`, large files go through hf-xet's own local store."""

    def __init__(self, *, xet: bool = False) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.users: dict[str, str] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.served: dict[tuple[str, str], bytes] = {}
        self.page_size = 1000
        self.lock = threading.RLock()
        self.store = Path(tempfile.mkdtemp(prefix="xet-")) if xet else None

    def __enter__(self) -> "Hub":
        from tests.fixtures_hf_http import Handler

        handler = type("Handler", (Handler,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.store_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        serve = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in self._servers]
        for thread in serve:
            thread.start()
        self._threads = serve
        return self

    def __exit__(self, *_: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
        if self.store:
            shutil.rmtree(self.store)

    def put(
        self,
        repo: str,
        files: Mapping[str, bytes] | Path,
        kind: str = "model",
        private: bool = False,
        gated: bool = False,
        owner: str | None = None,
        ref: str = "main",
    ) -> str:
        """Commit files, of a folder or by name, on top of what the repository has; returns the commit.

        `kind` is model or dataset; who may see the repository is said when it is first put.
        """
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        with self.lock:
            made = self.repos.get((kind, repo)) or self.create(repo, kind, private, owner or repo.split("/")[0], gated)
            before = made.files(ref) or made.files("main")
            assert before is not None
            return made.commit({**before[1], **{path: self.blob(path, data) for path, data in files.items()}}, ref)

    def create(self, repo: str, kind: str, private: bool, owner: str, gated: bool = False) -> Repo:
        made = self.repos[kind, repo] = Repo(repo, kind, private, gated, {owner})
        made.commit({".gitattributes": self.blob(".gitattributes", b"*.safetensors filter=lfs\n")})
        return made

    def blob(self, path: str, data: bytes) -> Blob:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = Blob(digest, len(data), oid, path.endswith(LARGE) and bool(data))
        if self.store and blob.large and digest not in self.xet_hashes():
            self._store(data)
        return blob

    def _store(self, data: bytes) -> None:
        import hf_xet

        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            access = ("token", int(time.time()) + 3600)
            hf_xet.upload_files([file.name], f"local://{self.store}", access, None, None, "model")

    def xet_hashes(self) -> dict[str, str]:
        """The xet hash of everything in the local store by its sha256, read from the store's own index."""
        found: dict[str, str] = {}
        for shard in (self.store or Path("/nowhere")).glob("xet/xorbs/shards/*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:  # the last entry of files
                flags, count = struct.unpack_from("<II", data, at + 32)
                name = _hash_text(data, at)
                at += 48 * (1 + count * (2 if flags >> 31 & 1 else 1))
                if flags >> 30 & 1:
                    found[_hash_text(data, at)] = name
                    at += 48
        return found

    def token(self, user: str) -> str:
        """A token of that user, who is made with it; of the name of an organisation, one that acts for it."""
        token = "hf_" + hashlib.sha256(user.encode()).hexdigest()[:34]
        self.users[token] = user
        return token

    def revoke(self, token: str) -> None:
        del self.users[token]

    def allow(self, repo: str, user: str, kind: str = "model") -> None:
        """Let a user read a private repository, or accept a gated one's terms."""
        self.repos[kind, repo].readers.add(user)

    def read(self, repo: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What the repository holds."""
        found = self.repos[kind, repo].files(revision)
        assert found is not None
        return {path: self.blobs[blob.sha256] for path, blob in found[1].items()}

    def head(self, repo: str, kind: str = "model") -> str:
        return self.repos[kind, repo].refs["main"]

    def fail(
        self,
        match: str,
        *,
        times: int = 1,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        """Answer the next requests like `GET /x/resolve/...` with a status, or break off after `cut` bytes."""
        self.faults.append(Fault(match, times, status, headers or {}, cut))

    def tamper(self, repo: str, path: str, data: bytes | None = None) -> None:
        """From now on serve other bytes for a file, by default as many with one of them changed, as no hub should."""
        was = self.read(repo)[path]
        self.served[repo, path] = bytes([was[0] ^ 1]) + was[1:] if data is None else data

    def swap(self, repo: str, one: str, other: str) -> None:
        files = self.read(repo)
        self.served |= {(repo, one): files[other], (repo, other): files[one]}

    def heal(self) -> None:
        self.served.clear()
        self.faults.clear()

    def count(self, match: str) -> int:
        return sum(match in f"{request.method} {request.path}" for request in self.requests)

    def use(self, monkeypatch: pytest.MonkeyPatch, user: str | None = None) -> "Hub":
        """Point the clients of this process here, signed in as a user or as nobody."""
        from huggingface_hub import constants

        for name, value in self.environment(user).items():
            monkeypatch.setenv(name, value)
        if user is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(Path(tempfile.gettempdir()) / "no" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", self.store is None)
        return self

    def environment(self, user: str | None = None) -> dict[str, str]:
        """For a process of its own. Where its cache lies (HF_HOME) is the caller's to say."""
        quiet = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_PROGRESS_BARS")
        xet = {"HF_XET_CACHE": str(self.store / "cache")} if self.store else {"HF_HUB_DISABLE_XET": "1"}
        signed = {"HF_TOKEN": self.token(user)} if user else {}
        return {"HF_ENDPOINT": self.url, **dict.fromkeys(quiet, "1"), **xet, **signed}


def _hash_text(data: bytes, at: int) -> str:
    return "".join(f"{part:016x}" for part in struct.unpack_from("<4Q", data, at))
