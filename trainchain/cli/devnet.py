"""devnet: an embedded chain behind an RPC of its own, to try out what runs on a chain by URL."""

from typing import Annotated

import typer

from trainchain.cli.options import Home, JsonLines
from trainchain.cli.output import Output


def devnet(
    name: Annotated[str, typer.Option(metavar="NAME", help="The chain's file in --home.")] = "devnet",
    port: Annotated[int, typer.Option(min=0, max=65535, help="On loopback. Port 0 takes any free one.")] = 8545,
    home: Home = None,
    json_: JsonLines = False,
) -> None:
    """Serve an embedded chain's JSON-RPC on loopback until stopped. Its coins are worth nothing.

    \b
    Examples:
      trainchain devnet
      trainchain devnet --port 0 --home ./chain --json
    """
    from trainchain.chain.devnet.server import make_server
    from trainchain.chain.provider import open_devnet
    from trainchain.core.errors import TrainChainError
    from trainchain.core.settings import Settings

    out = Output(json_mode=json_)
    node = open_devnet(name, Settings.load(home).home)
    try:
        server = make_server(node, port=port)
    except OSError as error:
        raise TrainChainError(
            "hub.address_in_use", f"Port {port} cannot be listened on: {error.strerror}.", hint="--port 0"
        ) from None
    url = f"http://127.0.0.1:{server.server_address[1]}"
    document = {"event": "ready", "url": url, "chain_id": node.chain_id, "faucet": node.faucet().address}
    out.event(document, f"chain    {url}  id {node.chain_id}  faucet {node.faucet().address}")
    if not out.json_mode:
        out.result(url, document)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        node.close()
