"""What all commands share: lazy groups, common options, and how a command ends.

Exit status: 0 done; 1 refused or failed; 2 wrong usage; 70 a fault of Flame itself; 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from flame.errors import FlameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from flame.client import Client

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

FAILED = 1
USAGE = 2
FAULT = 70
INTERRUPTED = 130

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called; what its help says of them is said here.

    :param lazy: name -> (``module:attribute``, one line of help).
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which help shows them."""
        return [*self._lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self._lazy[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._lazy.items()])


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\n" + "\n".join(["Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)])


def server_option(function: Function) -> Function:
    """``--server``."""
    text = "The server's address. Else FLAME_SERVER, else the configured one, else the one that runs on this machine."
    return click.option("--server", metavar="URL", help=text)(function)


def output_option(function: Function) -> Function:
    """``-o table|json|yaml``."""
    kinds = click.Choice(["table", "json", "yaml"])
    text = "What to print: a table to read, or one document."
    return click.option("-o", "--output", "how", type=kinds, default="table", show_default=True, help=text)(function)


def set_option(function: Function) -> Function:
    """``--set path=value``, any number of times."""
    text = "Change a field of the job, such as hyperparameters.rounds=5. Can be given several times."
    return click.option("--set", "overrides", metavar="PATH=VALUE", multiple=True, help=text)(function)


def ask(server: str | None, question: Callable[[Client], Awaitable[T]]) -> T:
    """Run something that needs a client.

    :param server: what ``--server`` said.
    :param question: gets the client.
    """
    import asyncio

    from flame.client import Client

    async def answer() -> T:
        async with Client(server) as client:
            return await question(client)

    return asyncio.run(answer())


def finish(command: click.Command, arguments: list[str] | None) -> NoReturn:
    """Run the whole command line and end the process; whatever goes wrong is said in a sentence or two."""
    try:
        status = command.main(args=arguments, prog_name="flame", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except FlameError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(USAGE if isinstance(error, UsageError) else FAILED)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Who was to read has left. Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as error:
        click.echo(f"Error: Flame has a fault of its own ({type(error).__name__}: {error}). {_traceback()}", err=True)
        sys.exit(FAULT)


def _traceback() -> str:
    """Write the traceback to a file; a sentence about where."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="flame-", suffix=".txt", delete=False) as file:
        file.write(f"{' '.join(sys.argv)}\n{traceback.format_exc()}")
    return f"The details are in {file.name}; please report them."
