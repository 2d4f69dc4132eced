"""The process that calls a reward function of the project.

It is run as a file, and imports what the function's file imports.

Requests and replies are lines of JSON, in the standard input and output that the process began with. What the function
prints goes to the log.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

GRACE = 5.0
"""Seconds after the limit at which this process ends itself, if the one that started it is gone."""


def _load(path: Path, name: str) -> tuple[Callable[..., Any] | None, str]:
    """The function, and the problem if there is none."""
    sys.path.insert(0, str(path.parent))
    try:
        function = runpy.run_path(str(path)).get(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the project's code may raise anything; the error is reported
        return None, f"fails: {type(error).__name__}: {error}"
    return (function, "") if callable(function) else (None, f"has no function {name!r}")


def _reply(function: Callable[..., Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """The scores, or the problem, with the number of the first answer for which the function also fails alone."""
    columns = request["prompts"], request["answers"], request["records"]
    try:
        return {"scores": [float(score) for score in function(*columns)]}
    except (Exception, SystemExit) as error:  # noqa: BLE001  as above
        problem = f"{type(error).__name__}: {error}"
    for number in range(len(request["answers"])):
        try:
            [float(score) for score in function(*(column[number : number + 1] for column in columns))]
        except (Exception, SystemExit) as error:  # noqa: BLE001  as above
            return {"problem": f"{type(error).__name__}: {error}", "example": number}
    return {"problem": problem}


def main(path: Path, name: str, seconds: float) -> None:
    """Reply to requests until stdin ends."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, whose end of the pipe closes
    me = os.getpid()

    def send(reply: Mapping[str, Any]) -> None:
        if os.getpid() != me:  # the function forked, and its child returned
            os._exit(0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
    function, problem = _load(path, name)
    if function is None:
        send({"problem": problem})
        return
    send({})
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = requests.readline()
        if not line:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
        send(_reply(function, json.loads(line)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
