"""The command: the group, and the one place where errors become messages and exit codes.

At module level only the standard library, typer and core's stdlib words: `--help` must not wait for torch.
"""

import logging
import signal
import sys
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from trainchain import __version__
from trainchain.cli import (
    cache,
    chain,
    claim,
    data,
    devnet,
    doctor,
    earnings,
    jobs,
    merge,
    pull,
    push,
    run,
    serve_gpu,
    serve_hub,
    submit,
    train,
    verify,
    wallet,
)
from trainchain.cli.output import Output
from trainchain.core.errors import TrainChainError

app = typer.Typer(
    name="trainchain",
    help="Fine-tune open models on other people's GPUs; pay for the work that stands up to checking.",
    epilog="Start with: trainchain run recipes/quickstart/recipe.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Fine-tune open models on other people's GPUs; pay for the work that stands up to checking."""


app.command("run")(run.run)
app.command("submit")(submit.submit)
app.add_typer(jobs.app, name="jobs")
app.command("pull")(pull.pull)
app.command("push")(push.push)
app.command("serve-gpu")(serve_gpu.serve_gpu)
app.command("claim")(claim.claim)
app.command("earnings")(earnings.earnings)
app.command("verify")(verify.verify)
app.command("serve-hub")(serve_hub.serve_hub)
app.command("train")(train.train)
app.command("merge")(merge.merge)
app.add_typer(data.app, name="data")
app.add_typer(wallet.app, name="wallet")
app.add_typer(chain.app, name="chain")
app.add_typer(cache.app, name="cache")
app.command("doctor")(doctor.doctor)
app.command("devnet")(devnet.devnet)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; ends the process with the exit code of the answer."""
    sys.exit(run_command(sys.argv[1:] if argv is None else argv))


def run_command(argv: list[str]) -> int:
    """Parse and run; expected failures become a message, a hint and their exit code. Bugs keep their traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    output = Output(json_mode="--json" in argv)
    signal.signal(signal.SIGTERM, _terminated)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup wants it ignored
        signal.signal(signal.SIGHUP, _terminated)
    try:
        result: Any = app(argv, standalone_mode=False)
    except TrainChainError as error:
        output.error(error)
        return error.exit_code
    except TyperException as error:
        message = error.format_message()
        if message.startswith("Usage: "):  # the help of a group of which no command was named
            output.note(message)
            message = "No command was named."
        hint = " ".join(["trainchain", *_command_of(error), "--help"])
        output.error(TrainChainError("usage.flag", _sentence(message), hint=hint))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        output.note("stopped")
        return 130
    except _Terminated:
        output.note("stopped")
        return 143
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        unusable = TrainChainError("usage.file", f"{error.filename}: {error.strerror}.", hint="Check that path.")
        output.error(unusable)
        return unusable.exit_code
    if result == 130:  # typer turns an interrupt into this
        output.note("stopped")
    return result if isinstance(result, int) else 0


def _command_of(error: TyperException) -> list[str]:
    """The words of the command that was typed, as far as it was understood."""
    words: list[str] = []
    context = getattr(error, "ctx", None)
    while context is not None and context.parent is not None:
        words.insert(0, context.info_name)
        context = context.parent
    return words


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else text + "."


class _Terminated(BaseException):
    """SIGTERM, or a closed terminal, so that whoever holds a lease or a child lets go of it on the way out."""


def _terminated(*_: object) -> None:
    raise _Terminated
