"""The kinds of sources there are: one line each. What a kind needs is imported when it is used."""

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import Address, AzureAddress, HubAddress, Local, parse
from trainchain.core.sources.found import Source


def source_of(text: str | Address) -> Source:
    """The kind of source that an address, parsed or not, or a pinned source belongs to.

    Raises `source.address` or `source.unsupported` for what is none, a path of this machine among them.
    """
    address = text
    if isinstance(address, str):
        address = parse(address, "data" if address.lower().startswith("hf://datasets/") else "model")
    if isinstance(address, HubAddress):
        from trainchain.core.sources.hf import HuggingFace

        return HuggingFace()
    if isinstance(address, AzureAddress):
        from trainchain.core.sources.azureml import shared

        return shared()
    assert isinstance(address, Local)
    raise TrainChainError("source.address", f"{address.text!r} is a path of this machine, not a source elsewhere.")
