"""What a hub listens on."""

import socket

import pytest

from trainchain.cli.hub_process import _bind, _url
from trainchain.core.errors import TrainChainError


def test_no_answer_is_held_back() -> None:
    """asyncio turns Nagle's algorithm off for sockets that say they are TCP; else each answer takes 40 ms more."""
    with _bind("127.0.0.1:0") as bound:
        assert bound.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:0"])
def test_the_address_told_is_one_that_can_be_reached(listen: str) -> None:
    with _bind(listen) as bound:
        assert _url(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize("listen", ["", "7070", "host", "host:", ":x", "127.0.0.1:65536", "127.0.0.1:-1"])
def test_what_is_no_address_is_a_usage_error(listen: str) -> None:
    with pytest.raises(TrainChainError) as caught:
        _bind(listen)

    assert caught.value.code == "usage.flag"


def test_an_address_that_is_taken_is_said_so() -> None:
    with _bind("127.0.0.1:0") as bound, pytest.raises(TrainChainError) as caught:
        _bind(f"127.0.0.1:{bound.getsockname()[1]}")

    assert caught.value.code == "hub.address_in_use"
