"""A sign-in to one Azure cloud: the vendor's clients made once each, the workspace people mean, and two plain calls.

The extra `azure` is imported when something is first asked. Nothing is sent home: telemetry is off, and what
the vendor's loggers say goes nowhere, for it holds answers as they came, signed addresses among them.
"""

import importlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.azureml_address import Asset, NumberedWorkspace, Registry, Scope, Workspace, read
from trainchain.core.sources.azureml_errors import READ_REGISTRY, READ_WORKSPACE, SIGN_IN, asking, without_secrets

CONTEXT = ("AZUREML_SUBSCRIPTION_ID", "AZUREML_RESOURCE_GROUP", "AZUREML_WORKSPACE_NAME")
_CLOUD = "AZUREML_CURRENT_CLOUD"
_WORKSPACES_API = "2024-04-01"
_REGISTRY_API = "2021-10-01-dataplanepreview"
_RETRIES = 4
_BACKOFF = 0.8
_LONGEST_WAIT = 60.0
"""Seconds: what an answer's Retry-After may ask for at most."""
_MOST_PAGES = 100
_PIECE = 16 << 20
"""Bytes."""


@dataclass(frozen=True)
class Cloud:
    """Where an Azure cloud answers. `metadata` are the endpoints for one that azure-ai-ml does not know by name."""

    name: str
    manager: str
    discovery: str
    storage: str
    metadata: Mapping[str, str] | None = None


CLOUDS = {
    cloud.name: cloud
    for cloud in (
        Cloud("AzureCloud", "https://management.azure.com", "https://eastus.api.azureml.ms", "core.windows.net"),
        Cloud(
            "AzureUSGovernment",
            "https://management.usgovcloudapi.net",
            "https://usgovarizona.api.ml.azure.us",
            "core.usgovcloudapi.net",
        ),
        Cloud(
            "AzureChinaCloud",
            "https://management.chinacloudapi.cn",
            "https://chinaeast2.api.ml.azure.cn",
            "core.chinacloudapi.cn",
        ),
    )
}


def sdk(module: str) -> Any:
    """A module of the extra. Raises `source.needs_extra` where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own deprecations, which a user of ours can do nothing about
            return importlib.import_module(module)
    except ImportError as error:
        raise TrainChainError(
            "source.needs_extra",
            f"Azure ML needs libraries that are not installed here ({error.name or module}).",
            hint='pip install "trainchain[azure]"',
        ) from None


class Session:
    """Clients of one sign-in, kept by what they speak for. `sleep` is called between tries, in seconds."""

    def __init__(
        self,
        cloud: Cloud | None = None,
        credential: Any = None,
        environ: Mapping[str, str] = os.environ,
        folder: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cloud = cloud
        self._credential = credential
        self._environ = environ
        self._folder = folder
        self._sleep = sleep
        self._transport: Any = None
        self._clients: dict[Registry | Workspace, Any] = {}
        self._pipeline: Any = None

    @property
    def cloud(self) -> Cloud:
        if self._cloud is None:
            name = self._environ.get(_CLOUD) or "AzureCloud"
            if name not in CLOUDS:
                raise TrainChainError(
                    "source.unsupported",
                    f"{_CLOUD} names {name!r}, which is no cloud of Azure's that TrainChain knows.",
                    hint=f"One of {', '.join(CLOUDS)}.",
                )
            self._cloud = CLOUDS[name]
        return self._cloud

    def credential(self) -> Any:
        """Who is signed in: what was given, else whatever DefaultAzureCredential finds."""
        if self._credential is None:
            identity = sdk("azure.identity")
            self._quiet()
            try:
                self._credential = identity.DefaultAzureCredential()
            except ValueError as error:  # an AZURE_... variable that it does not understand
                raise TrainChainError("source.token", without_secrets(str(error))[:300], hint=SIGN_IN) from None
        return self._credential

    def client(self, scope: Registry | Workspace) -> Any:
        """The MLClient of a registry or workspace."""
        if scope not in self._clients:
            names: dict[str, Any]
            if isinstance(scope, Registry):
                names = {"registry_name": scope.name}
            else:
                names = {
                    "subscription_id": scope.subscription,
                    "resource_group_name": scope.group,
                    "workspace_name": scope.name,
                }
            ml = sdk("azure.ai.ml")
            with asking(str(scope), role_to_read(scope)):
                self._clients[scope] = ml.MLClient(self.credential(), **names, **self._options())
        return self._clients[scope]

    def context(self) -> Workspace:
        """The workspace of short addresses: three variables, or the config.json that Azure's own tools find."""
        values = [self._environ.get(name) or "" for name in CONTEXT]
        if any(values):
            missing = [name for name, value in zip(CONTEXT, values, strict=True) if not value]
            if missing:
                raise TrainChainError(
                    "source.address",
                    f"{', '.join(set(CONTEXT) - set(missing))} is set, but {', '.join(missing)} is not.",
                    hint="Set all three, or write the long form of the address.",
                )
            return _workspace(*values)
        ml = sdk("azure.ai.ml")
        exceptions = sdk("azure.ai.ml.exceptions")
        try:
            found = ml.MLClient.from_config(self.credential(), path=self._folder, **self._options())
        except (exceptions.ValidationException, ValueError, OSError) as error:
            broken = "" if "could not find" in str(error) else " that can be read"
            raise TrainChainError(
                "source.address",
                f"A short Azure ML address needs a workspace, and there is no config.json{broken}, nor {CONTEXT[2]}.",
                hint=f"Set {', '.join(CONTEXT)}, put the workspace's config.json here, or write the long form.",
            ) from None
        return _workspace(found.subscription_id, found.resource_group_name, found.workspace_name or "")

    def workspace_of(self, numbered: NumberedWorkspace) -> Workspace:
        """The workspace with this GUID, looked for in the subscription at hand."""
        subscription = self._environ.get(CONTEXT[0]) or self.context().subscription
        address = (
            f"{self.cloud.manager}/subscriptions/{subscription}/providers/Microsoft.MachineLearningServices/workspaces"
        )
        link: str | None = f"{address}?api-version={_WORKSPACES_API}"
        for _ in range(_MOST_PAGES):
            if not link or not link.startswith(f"{self.cloud.manager}/"):
                break
            page = self.call("GET", link, None, f"the workspaces of subscription {subscription}", "`Reader`")
            for item in page.get("value", []):
                if str(item["properties"].get("workspaceId", "")).lower() == numbered.guid:
                    scope = read(f"{item['id']}/models/any/versions/1", "model").scope
                    assert isinstance(scope, Workspace)
                    return scope
            link = page.get("nextLink")
        raise TrainChainError(
            "source.not_found",
            f"Subscription {subscription} has no workspace with the GUID {numbered.guid} that this sign-in may see.",
            hint="Write azureml://subscriptions/S/resourcegroups/G/workspaces/W/..., or set AZUREML_SUBSCRIPTION_ID.",
        )

    def signed(self, asset: Asset, uri: str) -> str:
        """The address, signed for a while, of the container that holds a registry's asset: a secret."""
        assert isinstance(asset.scope, Registry)
        what = str(asset)
        registry = asset.scope.name
        where = self.call(
            "GET",
            f"{self.cloud.discovery}/registrymanagement/v1.0/registries/{registry}/discovery",
            None,
            what,
            READ_REGISTRY,
        )
        with asking(what, READ_REGISTRY):
            region = str(where["primaryRegionResourceProviderUri"]).rstrip("/")
            group = f"subscriptions/{where['subscriptionId']}/resourceGroups/{where['resourceGroup']}"
        answer = self.call(
            "POST",
            f"{region}/mferp/managementfrontend/{group}/providers/Microsoft.MachineLearningServices"
            f"/registries/{registry}/datarefs/{asset.name}/versions/{asset.version}?api-version={_REGISTRY_API}",
            {
                "assetId": f"azureml://registries/{registry}/{asset.what}/{asset.name}/versions/{asset.version}",
                "blobUri": uri,
            },
            what,
            READ_REGISTRY,
        )
        with asking(what, READ_REGISTRY):
            reference = answer["blobReferenceForConsumption"]
            return str(reference["credential"].get("sasUri") or reference["blobUri"])

    def call(self, method: str, url: str, body: Any, what: str, role: str) -> Any:
        """One signed-in request to Azure's control plane, retried as its clients retry; the answer's JSON."""
        core = sdk("azure.core")
        rest = sdk("azure.core.rest")
        with asking(what, role):
            if self._pipeline is None:
                policies = sdk("azure.core.pipeline.policies")
                self._pipeline = core.PipelineClient(
                    base_url=self.cloud.manager,
                    policies=[
                        policies.UserAgentPolicy("trainchain"),
                        policies.RetryPolicy(retry_total=_RETRIES, retry_backoff_factor=_BACKOFF),
                        policies.BearerTokenCredentialPolicy(self.credential(), f"{self.cloud.manager}/.default"),
                    ],
                    transport=self.transport(),
                )
            answer = self._pipeline.send_request(rest.HttpRequest(method, url, json=body))
            answer.raise_for_status()
            return answer.json()

    def container(self, address: str, name: str | None, credential: Any) -> Any:
        """The blob client of a container, by its account's address and name, or (name None) by its own address."""
        blob = sdk("azure.storage.blob")
        wait = self._sleep

        class Retry(blob.ExponentialRetry):  # type: ignore[misc, name-defined]
            def sleep(self, settings: Any, transport: Any) -> None:  # the transport's own is hidden from blobs
                wait(min(self.get_backoff_time(settings), _LONGEST_WAIT))

        options: dict[str, Any] = {
            "transport": self.transport(),
            "retry_policy": Retry(initial_backoff=1, increment_base=3, retry_total=_RETRIES),
            # What comes in one answer, and is lost when the connection breaks.
            "max_single_get_size": _PIECE,
            "max_chunk_get_size": _PIECE,
        }
        if name is None:
            return blob.ContainerClient.from_container_url(address, credential=credential, **options)
        return blob.ContainerClient(address, name, credential=credential, **options)

    def transport(self) -> Any:
        """One transport for all, whose waits are bounded: an answer may ask to come back in an hour."""
        if self._transport is None:
            base = sdk("azure.core.pipeline.transport").RequestsTransport
            wait = self._sleep

            class Patient(base):  # type: ignore[misc, valid-type]
                def sleep(self, duration: float) -> None:
                    wait(min(duration, _LONGEST_WAIT))

            self._transport = Patient(connection_timeout=20, read_timeout=60)
        return self._transport

    def _options(self) -> dict[str, Any]:
        self._quiet()
        options: dict[str, Any] = {
            "enable_telemetry": False,
            "cloud": self.cloud.name,
            "transport": self.transport(),
            "retry_total": _RETRIES,
            "retry_backoff_factor": _BACKOFF,
        }
        if self.cloud.metadata is not None:
            options["cloud_metadata"] = dict(self.cloud.metadata)
        return options

    def _quiet(self) -> None:
        for name in ("azure", "msal", "msrest"):
            logger = logging.getLogger(name)
            logger.propagate = False
            if not logger.handlers:
                logger.addHandler(logging.NullHandler())
        logging.getLogger("azure.ai.ml").setLevel(logging.CRITICAL)  # it writes to stderr by a handler of its own
        logging.getLogger("urllib3").setLevel(logging.INFO)  # below that it names every address with its signature


def role_to_read(scope: Scope) -> str:
    return READ_REGISTRY if isinstance(scope, Registry) else READ_WORKSPACE


def _workspace(subscription: str, group: str, name: str) -> Workspace:
    """Of names that came from outside; raises `source.address` where one of them is none."""
    scope = read(f"{'azureml://'}{Workspace(subscription, group, name)}/models/any/versions/1", "model").scope
    assert isinstance(scope, Workspace)
    return scope
