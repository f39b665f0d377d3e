"""A small Azure for tests: Azurite as the storage, a stub of the control plane, both over HTTPS on this machine.

The vendor's clients run unmodified against it. The stub checks the bearer token and answers what those clients ask, as
they understand it; that the real Azure answers the same is not shown by it.
"""

import base64
import contextlib
import datetime
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from trainchain.core.sources.azureml_session import Cloud

SUBSCRIPTION = "0a1b2c3d-1111-2222-3333-444455556666"
GROUP = "rg-ml"
WORKSPACE = "ws"
GUID = "99998888-7777-6666-5555-444433332222"
REGISTRY = "ours"
TOKEN = "control-plane-token-that-is-a-secret"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # Azurite's, public
LONG = f"azureml://subscriptions/{SUBSCRIPTION}/resourcegroups/{GROUP}/workspaces/{WORKSPACE}"
ARM = (
    f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{GROUP}/providers/Microsoft.MachineLearningServices"
    f"/workspaces/{WORKSPACE}"
)
_ASSET = re.compile(r"/(workspaces|registries)/([^/]+)/(models|data)/([^/]+)(?:/versions(?:/([^/]+))?)?$")
_STORE = re.compile(r"/workspaces/[^/]+/datastores/([^/]+)(/listSecrets)?$", re.IGNORECASE)
_SIGNED = re.compile(r"/registries/([^/]+)/(datarefs|tempdatarefs)/([^/]+)/versions/([^/]+)$")


@dataclass(frozen=True)
class Certificate:
    """A certificate that signs itself, for everything that listens here."""

    certificate: Path
    key: Path


@dataclass
class Fault:
    """What to answer instead to the next `times` requests whose `METHOD /path` matches."""

    pattern: str
    status: int
    times: int = 1_000
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Stub:
    """What the control plane knows, and what it was asked."""

    storage_port: int
    origin: str = ""
    assets: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = field(default_factory=dict)
    stores: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    registry_container: str = ""
    signature_hours: float = 1.0
    policy: str | None = None

    @property
    def account_address(self) -> str:
        return f"https://{ACCOUNT}.blob.core.localhost:{self.storage_port}"

    @property
    def cloud(self) -> Cloud:
        """The cloud that is this stub. Its name bears the port: the SDK remembers clouds by name."""
        storage = f"core.localhost:{self.storage_port}"
        return Cloud(
            f"stub{self.origin.rpartition(':')[2]}",
            self.origin,
            self.origin,
            storage,
            {
                "azure_portal": self.origin,
                "resource_manager": self.origin,
                "active_directory": self.origin,
                "aml_resource_id": self.origin,
                "storage_endpoint": storage,
                "registry_discovery_endpoint": f"{self.origin}/",
            },
        )

    def container(self, name: str) -> Any:
        """A container of the storage account, opened with the account's key."""
        from azure.storage.blob import ContainerClient

        return ContainerClient(self.account_address, name, credential=KEY)

    def put(self, container: str, prefix: str, files: dict[str, bytes], **options: Any) -> None:
        for name, data in files.items():
            self.container(container).upload_blob(
                f"{prefix}/{name}" if name else prefix, data, overwrite=True, **options
            )

    def register(
        self, where: str, what: str, name: str, version: str, uri: str, tags: dict[str, str] | None = None
    ) -> None:
        """Know an asset: `where` is a workspace's or registry's name, `uri` where its files lie."""
        key = "modelUri" if what == "models" else "dataUri"
        kind = {"modelType": "custom_model"} if what == "models" else {"dataType": "uri_folder"}
        self.assets.setdefault((where, what, name), {})[version] = {key: uri, **kind, "tags": tags or {}}

    def store(self, name: str, container: str, credentials: str = "AccountKey", kind: str = "AzureBlob") -> None:
        """Know a datastore: with a key, a signature ("Sas"), or nothing but who asks ("None")."""
        self.stores[name] = {"container": container, "credentials": credentials, "kind": kind}

    def signature(self, container: str, write: bool = False) -> str:
        from azure.storage.blob import ContainerSasPermissions, generate_container_sas

        now = datetime.datetime.now(datetime.UTC)
        if self.policy:
            return generate_container_sas(ACCOUNT, container, account_key=KEY, policy_id=self.policy)
        return generate_container_sas(
            ACCOUNT,
            container,
            account_key=KEY,
            permission=ContainerSasPermissions(read=True, list=True, write=write, create=write),
            start=now - datetime.timedelta(days=1),
            expiry=now + datetime.timedelta(hours=self.signature_hours),
        )

    def allow_signatures(self) -> None:
        """From now on sign for the registry's container in a way that can be withdrawn."""
        from azure.storage.blob import AccessPolicy, ContainerSasPermissions

        now = datetime.datetime.now(datetime.UTC)
        policy = AccessPolicy(
            ContainerSasPermissions(read=True, list=True), now + datetime.timedelta(hours=1), now.replace(microsecond=0)
        )
        self.container(self.registry_container).set_container_access_policy({"policy": policy})
        self.policy = "policy"

    def withdraw_signatures(self) -> None:
        """Make all that were signed so far worthless, and sign plainly again."""
        self.container(self.registry_container).set_container_access_policy({})
        self.policy = None

    # What the handler asks: each returns a status and a JSON value.

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        if "/registrymanagement/" in path:
            return 200, {
                "registryName": path.split("/")[-2],
                "primaryRegionResourceProviderUri": f"{self.origin}/",
                "resourceGroup": GROUP,
                "subscriptionId": SUBSCRIPTION,
            }
        if path.lower().endswith("/providers/microsoft.machinelearningservices/workspaces"):
            return self._workspaces(query)
        if found := _SIGNED.search(path):
            return self._signed(found[2], found[4])
        if found := _STORE.search(path):
            return self._store(found[1], bool(found[2]))
        if found := _ASSET.search(path):
            return self._asset(method, path, found, query, body)
        return 404, _error("NotFound")

    def _workspaces(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        if "page" not in query:
            link = f"{self.origin}/subscriptions/{SUBSCRIPTION}/providers/Microsoft.MachineLearningServices/workspaces"
            other = {"id": ARM.replace(f"/{WORKSPACE}", "/other"), "properties": {"workspaceId": GUID[::-1]}}
            return 200, {"value": [other], "nextLink": f"{link}?page=2"}
        return 200, {"value": [{"id": ARM, "properties": {"workspaceId": GUID.upper()}}]}

    def _signed(self, how: str, version: str) -> tuple[int, Any]:
        if how == "tempdatarefs" and not version.isdecimal():
            return 409, _error("Conflict")
        address = f"{self.account_address}/{self.registry_container}"
        signature = self.signature(self.registry_container, write=how == "tempdatarefs")
        return 200, {
            "blobReferenceForConsumption": {
                "blobUri": address,
                "credential": {"credentialType": "SAS", "sasUri": f"{address}?{signature}"},
            }
        }

    def _store(self, name: str, secrets: bool) -> tuple[int, Any]:
        if name not in self.stores:
            return 404, _error("UserError")
        store = self.stores[name]
        if secrets:
            if store["credentials"] == "Sas":
                return 200, {"secretsType": "Sas", "sasToken": self.signature(store["container"])}
            return 200, {"secretsType": "AccountKey", "key": KEY}
        return 200, {
            "id": f"{ARM}/datastores/{name}",
            "name": name,
            "properties": {
                "datastoreType": store["kind"],
                "accountName": ACCOUNT,
                "containerName": store["container"],
                "filesystem": store["container"],
                "fileShareName": "share",
                "endpoint": f"core.localhost:{self.storage_port}",
                "protocol": "https",
                "credentials": {"credentialsType": store["credentials"]},
            },
        }

    def _asset(
        self, method: str, path: str, found: re.Match[str], query: dict[str, list[str]], body: Any
    ) -> tuple[int, Any]:
        scope, where, what, name, version = found.groups()
        versions = self.assets.get((where, what, name), {})
        base = f"azureml://registries/{where}/{what}/{name}" if scope == "registries" else f"{ARM}/{what}/{name}"
        if method == "PUT" and version:
            key = "modelUri" if what == "models" else "dataUri"
            if version in versions and versions[version][key] != body["properties"][key]:
                return 409, _error("Conflict")
            self.assets.setdefault((where, what, name), {})[version] = body["properties"]
            return 201, _version(base, version, body["properties"])
        if not versions and scope == "registries" and path.endswith("/versions"):
            return 200, {"value": []}  # with a 404 the SDK could never register a first version there
        if not versions:
            return 404, _error("UserError")
        if version:
            return (
                (200, _version(base, version, versions[version])) if version in versions else (404, _error("UserError"))
            )
        if path.endswith("/versions"):
            newest = [_version(base, key, value) for key, value in reversed(versions.items())]
            return 200, {"value": newest[: int(query.get("$top", ["1000"])[0])]}
        latest = list(versions)[-1]
        return 200, {
            "id": base,
            "name": name,
            "properties": {"latestVersion": latest, "nextVersion": str(int(latest) + 1), "tags": {}, "properties": {}},
        }


def _version(base: str, version: str, properties: dict[str, Any]) -> dict[str, Any]:
    defaults = {"flavors": {}, "properties": {}, "tags": {}, "description": ""}
    return {"id": f"{base}/versions/{version}", "name": version, "properties": {**defaults, **properties}}


def _error(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": f"not for people: https://a.b/c?sig={KEY}"}}


class Person:
    """A sign-in that is at hand: one token for the control plane, one (signed by nobody) for the storage."""

    def __init__(self, token: str = TOKEN, storage: bool = True) -> None:
        self.token = token
        self.storage = storage

    def get_token(self, *scopes: str, **_: Any) -> Any:
        from azure.core.credentials import AccessToken

        now = int(datetime.datetime.now(datetime.UTC).timestamp())
        if "storage" not in scopes[0]:
            return AccessToken(self.token, now + 3600)
        audience = "https://storage.azure.com" if self.storage else "https://somewhere.else"
        claims = {
            "aud": audience,
            "iss": "https://sts.windows.net/00000000-0000-0000-0000-000000000000/",
            "nbf": now - 60,
            "iat": now - 60,
            "exp": now + 3600,
        }
        head, body = (
            base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
            for part in ({"alg": "none", "typ": "JWT"}, claims)
        )
        return AccessToken(f"{head}.{body}.c2ln", now + 3600)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait for each other
    stub: Stub

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        self.stub.asked.append(line)
        headers: dict[str, str] = {}
        fault = next((fault for fault in self.stub.faults if fault.times and re.search(fault.pattern, line)), None)
        if fault:
            fault.times -= 1
            status, answer, headers = fault.status, _error("Fault"), fault.headers
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, answer = 401, _error("InvalidAuthenticationToken")
        else:
            status, answer = self.stub.answer(
                self.command, unquote(url.path), parse_qs(url.query), json.loads(body) if body else None
            )
        data = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _serve

    def log_message(self, *_: Any) -> None:
        pass


class _Pipe(StreamRequestHandler):
    """One connection through the bad line, its answers cut after so many bytes."""

    server: "BadLine"

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.behind)) as there:
            threading.Thread(target=self._up, args=(there,), daemon=True).start()
            left = self.server.most
            with contextlib.suppress(OSError):
                while data := there.recv(65_536):
                    self.connection.sendall(data[:left] if left is not None else data)
                    left = None if left is None else left - len(data)
                    if left is not None and left <= 0:
                        self.server.cut += 1
                        break
                self.connection.shutdown(socket.SHUT_RDWR)

    def _up(self, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := self.connection.recv(65_536):
                there.sendall(data)


class BadLine(ThreadingTCPServer):
    """A way to the storage that breaks: every connection after `most` bytes of answers, None for a good one."""

    daemon_threads = True

    def __init__(self, behind: int, most: int | None) -> None:
        super().__init__(("127.0.0.1", 0), _Pipe)
        self.behind = behind
        self.most = most
        self.cut = 0


@contextlib.contextmanager
def bad_line(behind: int, most: int | None) -> Iterator[BadLine]:
    server = BadLine(behind, most)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def control_plane(own: Certificate, storage_port: int) -> Iterator[Stub]:
    stub = Stub(storage_port)
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.certificate, own.key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    stub.origin = f"https://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def azurite_binary() -> Path:
    """The blob server that TRAINCHAIN_AZURITE names; skips the test where there is none."""
    named = os.environ.get("TRAINCHAIN_AZURITE")
    if not named:
        pytest.skip("TRAINCHAIN_AZURITE does not name an azurite-blob binary (npm install azurite)")
    if not Path(named).exists() or not shutil.which("node"):
        pytest.skip(f"TRAINCHAIN_AZURITE names {named}, which is not there, or node is missing")
    return Path(named)


@contextlib.contextmanager
def azurite(binary: Path, own: Certificate, folder: Path) -> Iterator[int]:
    """A running Azurite; gives the port it listens on."""
    process = subprocess.Popen(
        [
            *(str(binary), "--inMemoryPersistence", "--silent", "--disableTelemetry", "--skipApiVersionCheck"),
            *("--blobPort", "0", "--oauth", "basic", "--cert", str(own.certificate), "--key", str(own.key)),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    try:
        for line in process.stdout:
            if found := re.search(r"successfully listens on https://127\.0\.0\.1:(\d+)", line):
                yield int(found[1])
                break
        else:
            pytest.fail("Azurite ended without listening")
    finally:
        process.terminate()
        process.stdout.close()
        process.wait(timeout=20)


def certificate(folder: Path) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "TrainChain's tests")])
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.DNSName(f"{ACCOUNT}.blob.core.localhost")]
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(
            x509.SubjectAlternativeName([*names, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    own = Certificate(folder / "own.pem", folder / "own.key")
    own.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    own.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return own


def resolve_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every name below .localhost be this machine, which not every system's resolver knows."""
    real = socket.getaddrinfo

    def here(host: Any, *rest: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return real("127.0.0.1" if isinstance(name, str) and name.endswith(".localhost") else host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", here)
