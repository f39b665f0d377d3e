"""Every test runs with a home of its own, one thread, and nothing of the developer's settings."""

import os
import signal
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy or torch is imported
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job, and then by every child
KEPT = ("TRAINCHAIN_ANVIL", "TRAINCHAIN_AZURITE")
"""What stays of them: where programs lie that are tested against."""


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TRAINCHAIN_") and name not in KEPT]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRAINCHAIN_HOME", str(_home(tmp_path_factory)))


def _home(factory: pytest.TempPathFactory) -> Path:
    """A place that does not exist yet: a test that makes it, makes it on purpose."""
    return factory.getbasetemp() / "homes" / os.urandom(8).hex()
