"""`pedigree ui`."""

from __future__ import annotations

import argparse
from typing import Any

from dagster_project.cli.arguments import add_command, named, project
from dagster_project.cli.output import print_result


def ui(options: argparse.Namespace) -> None:
    """Serve the Dagster UI and the project's pages on this machine's loopback address."""
    from dagster_project.orchestration.dagster import pages
    from dagster_project.orchestration.dagster.ui import serve

    root = project(options)
    port = pages.port_of(root) if options.pages_port is None else options.pages_port
    host = f"[{options.host}]" if ":" in options.host else options.host  # of IPv6
    addresses = {"url": f"http://{host}:{options.port}", "pages": f"http://{pages.HOST}:{port}/"}

    def announce() -> None:
        print_result(
            options, addresses, lambda found: f"Dagster UI: {found['url']}  (stop with Ctrl-C)\nPages: {found['pages']}"
        )

    serve(root, options.host, options.port, port, announce)


def add_commands(commands: Any) -> None:
    add = add_command(commands, ui).add_argument
    add(
        "--host",
        type=named,
        default="127.0.0.1",
        help="address to listen on; Dagster's UI has no authentication (default: %(default)s)",
    )
    add("--port", type=int, default=3000, help="default: %(default)s")
    add(
        "--pages-port",
        type=int,
        metavar="PORT",
        help="port of the pages on 127.0.0.1 (default: the latest one, initially 3100)",
    )
