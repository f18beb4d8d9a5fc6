"""The command line `blockd`: parses, asks the node service, prints, and tells exit codes apart.

Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 conflict, 5 timeout, 6 degraded,
7 writes that were not flushed may be lost; 130 when
interrupted. An error is one line `blockd: ...` on standard error that names the next step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from blockd.cli.root import app
from protocol.errors import BlockdError

INTERRUPTED_EXIT_CODE = 130  # what a shell reports for a program ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        result = app.main(args=_list(arguments), prog_name="blockd", standalone_mode=False)
    except click.UsageError as error:
        return _complain(_usage_text(error), 2)
    except click.Abort:
        return _complain("interrupted", INTERRUPTED_EXIT_CODE)
    except click.ClickException as error:
        return _complain(error.format_message(), 1)
    except BlockdError as error:
        return _complain(str(error), error.exit_code)
    return result if isinstance(result, int) else 0


def _list(arguments: Sequence[str] | None) -> list[str]:
    return list(sys.argv[1:] if arguments is None else arguments)


def _usage_text(error: click.UsageError) -> str:
    """The message in one line, with the command whose help to read."""
    message = " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command_path if error.ctx is not None else "blockd"
    return f"{message[:1].lower()}{message[1:]}; see `{command} --help`"


def _complain(message: str, exit_code: int) -> int:
    click.echo(f"blockd: {message}", err=True)
    return exit_code
