"""An adapter's folder as a version of an Azure ML model: known again by its content, uploaded by the vendor's client.

Three habits of azure-ai-ml 1.35 are met here. It looks at an upload's failure only while it draws a progress bar, and
waits for ever otherwise; it names what it uploaded wrongly where the folder is a link; and it does not go on with an
upload of the same content that broke off. So the bar is drawn into nothing, from a real folder with a name of its own.
"""

import contextlib
import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainchain.core.digests import sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.sources.azureml_errors import status_of
from trainchain.core.sources.azureml_session import sdk

CONTENT_TAG = "trainchain-content"
_MOST_VERSIONS = 5_000


def content_of(folder: Path) -> str:
    """One digest of all names and bytes of a folder."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{sha256_file(path)} {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def version_with(client: Any, name: str, content: str) -> str | None:
    """The version of a model that was pushed with this content, if there is one."""
    try:
        for seen, model in enumerate(client.models.list(name=name)):
            if (model.tags or {}).get(CONTENT_TAG) == content:
                return str(model.version)
            if seen >= _MOST_VERSIONS:
                break
    except Exception as error:
        if status_of(error) != 404:
            raise
    return None


def register(client: Any, name: str, folder: Path, content: str, message: str) -> str:
    """Upload the folder, register it, and tell the version. Raises what the client raises, and `push.conflict`."""
    with _mirrored(folder, name) as mirror, contextlib.redirect_stderr(io.StringIO()):
        model = sdk("azure.ai.ml.entities").Model(
            name=name, path=str(mirror), type="custom_model", description=message, tags={CONTENT_TAG: content}
        )
        try:
            return str(client.models.create_or_update(model).version)
        except Exception as error:
            if status_of(error) == 409 or type(error).__name__ == "AssetPathException":
                raise TrainChainError(
                    "push.conflict", f"Somebody else pushed to the model {name} at the same time.", hint="Push again."
                ) from None
            raise


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def _mirrored(folder: Path, name: str) -> Iterator[Path]:
    """The same files in a folder whose name, which shows in Azure, begins with the model's and was never used."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as scratch:
        mirror = Path(scratch).resolve()
        for path in _files(folder):
            link = mirror / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(path.resolve())
            except OSError:  # Windows lets not everybody make links
                shutil.copyfile(path, link)
        yield mirror
