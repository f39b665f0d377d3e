"""What Azure's clients raise, told as one of our errors: what happened, to what, and which role to ask for.

No text of Azure's answers is passed on, for it may hold signed addresses; only statuses and error codes are. The one
exception is the list of the credentials that were tried, which is what people need: cut per line, secrets struck out.
"""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainchain.core.errors import TrainChainError

READ_REGISTRY = "`Reader` or `AzureML Registry User` on the registry"
READ_WORKSPACE = (
    "`AzureML Data Scientist` on the workspace, which may list the datastore's secrets, or `Reader` there and"
    " `Storage Blob Data Reader` on its storage account"
)
WRITE_REGISTRY = "`AzureML Registry User` on the registry"
WRITE_WORKSPACE = (
    "`AzureML Data Scientist` on the workspace, and, where its datastores hold no keys,"
    " `Storage Blob Data Contributor` on its storage account"
)
SIGN_IN = (
    "Sign in with `az login`, or set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET of a service principal."
)
_LONGEST_LINE = 160
_MOST_LINES = 12
_ADDRESS_QUERY = re.compile(r"(https?://[^\s'\"?]*)\?[^\s'\"]*")
_SECRET_PAIR = re.compile(
    r"(?i)\b((?:sig|se|sv|skoid|accountkey|sharedaccesssignature|client_secret|password|assertion|access_token|"
    r"refresh_token|code)\s*[=:]\s*)[^\s&;,'\"]+"
)
_LONG_CODE = re.compile(r"[A-Za-z0-9+/_~=-]{40,}(?:\.[A-Za-z0-9+/_~=-]+)*")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def asking(what: str, role: str) -> Iterator[None]:
    """Run calls of Azure's clients about `what`, for which `role` is needed; whatever they raise is ours afterwards."""
    try:
        yield
    except TrainChainError:
        raise
    except Exception as error:
        raise told(error, what, role) from None  # the cause may name signed addresses


def told(error: Exception, what: str, role: str) -> TrainChainError:
    from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ServiceRequestError
    from azure.core.exceptions import ServiceResponseError as NoAnswer

    cause: BaseException = error
    while status_of(cause) is None and cause.__cause__ is not None:  # the SDK wraps some refusals in its own errors
        cause = cause.__cause__
    status, code = status_of(cause), code_of(cause)
    if status is None and isinstance(error, ClientAuthenticationError):
        return TrainChainError("source.token", f"Nobody is signed in to Azure.\n{tried(str(error))}", hint=SIGN_IN)
    if status == 401:
        return TrainChainError("source.token", f"Azure does not accept this sign-in for {what}{code}.", hint=SIGN_IN)
    if status == 403:
        return TrainChainError(
            "source.forbidden",
            f"This sign-in may not do that with {what}: Azure answered 403{code}.",
            hint=f"Ask its owner for the role {role}. A new role takes some minutes; a firewall answers the same.",
        )
    if status == 404 or _names_nothing(error):
        return TrainChainError(
            "source.not_found",
            f"Azure knows no {what}{code}.",
            hint="Check name, version, workspace and registry; what your sign-in may not see looks the same.",
        )
    if status == 412:
        return TrainChainError("source.changed", f"{what} was changed while it was fetched.", hint="Fetch it again.")
    if status is not None and (status in (408, 429) or status >= 500):
        return TrainChainError(
            "source.unavailable", f"Azure answered {status}{code} for {what}, again and again.", hint="Try again later."
        )
    if isinstance(error, ServiceRequestError | NoAnswer) or (isinstance(error, HttpResponseError) and status is None):
        return TrainChainError(
            "source.unavailable",
            f"Azure did not answer, or broke off, for {what} ({type(error).__name__}).",
            hint="Check the network and a proxy, and try again; what was fetched is kept.",
        )
    why = f"answered {status}{code}" if status is not None else f"could not be understood ({type(error).__name__})"
    return TrainChainError(
        "source.unsupported",
        f"Azure {why} for {what}.",
        hint="If it looks right in Azure ML studio, report this with the version of azure-ai-ml.",
    )


def tried(text: str) -> str:
    """The credentials that DefaultAzureCredential tried and why each failed: one short line each, no secret."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("To mitigate")]
    short = [without_secrets(line) for line in lines[:_MOST_LINES]]
    return "\n".join(f"  {line[:_LONGEST_LINE]}{'...' if len(line) > _LONGEST_LINE else ''}" for line in short)


def without_secrets(text: str) -> str:
    """Strike out queries of addresses, values of secret names, and anything that is long and looks like a key."""
    text = _ADDRESS_QUERY.sub(r"\1?...", text)
    text = _SECRET_PAIR.sub(r"\1...", text)
    return _LONG_CODE.sub("...", text)


def status_of(error: BaseException) -> int | None:
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else None


def code_of(error: BaseException) -> str:
    """Azure's own short word for it, as ` (Word)`, where it gave one."""
    code = getattr(error, "error_code", None) or getattr(getattr(error, "error", None), "code", None)
    text = str(getattr(code, "value", code) or "")
    return f" ({text})" if re.fullmatch(r"[A-Za-z]{1,60}", text) else ""


def _names_nothing(error: Exception) -> bool:
    """Whether the SDK itself says that an asset or label does not exist: it does that without a status."""
    return getattr(getattr(error, "error_type", None), "name", "") == "RESOURCE_NOT_FOUND"


@contextmanager
def writing(path: Path, done: str = "written") -> Iterator[None]:
    """Write to (or read) a file of this machine; a full disk and its like are ours afterwards."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _full(f"The disk has no room left for {path}.") from None
        raise TrainChainError(
            "usage.file", f"{path} cannot be {done}: {error.strerror}.", hint="Check the folder's rights."
        ) from None


def check_room(path: Path, size: int) -> None:
    """Raise `disk.full` where the disk of `path` has no room for `size` bytes more."""
    if shutil.disk_usage(path.parent).free < size:
        raise _full(f"{path} needs {size / 1e9:,.2f} GB more than its disk has free.")


def _full(message: str) -> TrainChainError:
    return TrainChainError("disk.full", message, hint="Free some (`trainchain cache ls`), then try again.")
