"""The command line: starts a command of cli/, and reports its errors. `--json`
prints one document on stdout; logs go to stderr."""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import sys
import warnings
from pathlib import Path

from dagster_project.commands import ending, own_process
from dagster_project.core.errors import INNER, DamagedIndex, Interrupted

log = logging.getLogger("pedigree")

atexit.register(
    gc.freeze
)  # before it ends, the interpreter searches all that the libraries hold for cycles: 1.5 s after a training


def _run(options: argparse.Namespace) -> int:
    """The command's exit code: 0 if it returns none. It runs again if the index of audits was damaged, a cache."""
    try:
        return int(options.function(options) or 0)
    except DamagedIndex as error:
        log.warning(f"{error.what}, and created again")
        return int(options.function(options) or 0)


def main(arguments: list[str] | None = None) -> int:
    ending.replace_closed_streams()
    try:
        with ending.interrupts() as interrupts:
            if arguments is None:
                own_process.prepare(sys.argv[1:])
            return _main(arguments, interrupts)
    except KeyboardInterrupt:  # before or after the command
        print(ending.INTERRUPTED, file=sys.stderr)
        return ending.EXIT_CODE
    finally:
        ending.flush()


def _main(arguments: list[str] | None, interrupts: ending.Interrupts) -> int:
    from dagster_project.cli.output import print_error

    options = _parsed(sys.argv[1:] if arguments is None else arguments)
    handler = ending.LogHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    log.addHandler(handler)
    log.addFilter(_mask)
    log.setLevel(logging.INFO)
    log.propagate = False
    for chatty in ("bitsandbytes", "httpx"):  # notices about features that are not used here
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with ending.terminating(interrupts, options.command):
            return _run(options)
    except SystemExit:
        raise
    except BaseException as error:  # also what is no Exception: Ctrl-C, and the end of a library in Rust
        explained = ending.explained(
            error, interrupts, options.command, Path(getattr(options, "project", ".")).absolute()
        )
        if explained is None:
            raise
        if not (isinstance(error, KeyboardInterrupt) and INNER in os.environ):
            message = str(explained).replace("\t", "\\t")  # a tab moves the cursor, and is not seen in a name
            log.error(message if isinstance(explained, Interrupted) else f"error: {message}")
            print_error(options, explained)
        return explained.exit_code
    finally:
        log.removeFilter(_mask)
        log.removeHandler(handler)


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """The options of the command. Wrong usage ends the process, as it does in `argparse`."""
    from dagster_project.cli.output import print_error, visible_lines, without_credentials
    from dagster_project.cli.parser import parser, refuse_separators
    from dagster_project.core.errors import InputError

    try:
        refuse_separators(arguments)
        return parser().parse_args(arguments)
    except InputError as error:
        sys.stderr.write(visible_lines(without_credentials(f"error: {error}\n")))
        print_error(argparse.Namespace(json="--json" in arguments), error)
        sys.exit(error.exit_code)


def _mask(record: logging.LogRecord) -> bool:
    """Remove credentials from a line of the log, for all who get it: the terminal and a run of Dagster."""
    from dagster_project.cli.output import without_credentials

    record.msg, record.args = without_credentials(record.getMessage()), ()
    return True


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from dagster_project.cli.output import visible_lines

        return visible_lines(super().format(record))


if __name__ == "__main__":
    code = main()
    ending.forget_unhandled()
    sys.exit(code)
