"""A system's keyring for tests: keyring's own interface over one file, chosen by PYTHON_KEYRING_BACKEND."""

import json
import os
from pathlib import Path

from keyring import backend, errors


class FileKeyring(backend.KeyringBackend):
    """Plain JSON at TEST_KEYRING_FILE. A file that says it is locked refuses everything."""

    priority = 1

    def get_password(self, service: str, username: str) -> str | None:
        found = self._read().get(f"{service} {username}")
        return None if found is None else str(found)

    def set_password(self, service: str, username: str, password: str) -> None:
        self._write({**self._read(), f"{service} {username}": password})

    def delete_password(self, service: str, username: str) -> None:
        kept = self._read()
        if kept.pop(f"{service} {username}", None) is None:
            raise errors.PasswordDeleteError(username)
        self._write(kept)

    @property
    def _path(self) -> Path:
        return Path(os.environ["TEST_KEYRING_FILE"])

    def _read(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        if found.get("locked"):
            raise errors.KeyringLocked(f"still locked: {found}")
        return found

    def _write(self, kept: dict[str, object]) -> None:
        self._path.write_text(json.dumps(kept), encoding="utf-8")
