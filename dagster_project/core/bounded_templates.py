"""Chat templates rendered in another process (`template_process`), with limited time and memory."""

from __future__ import annotations

import json
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dagster_project.core import template_process
from dagster_project.core.errors import PedigreeError

SECONDS = 5.0
"""Maximum processor seconds for one conversation. Many of them may take `template_process.SECONDS_PER_REQUEST` each."""
MEMORY = 1 << 30
"""Maximum additional bytes."""


class TemplateLimit(PedigreeError):
    """A chat template takes too much time or memory.

    It ends the command: the same template would do so for the next conversation.
    """

    exit_code = 2


class Refused(ValueError):
    """A chat template raised an error for a conversation."""


class _Renderer:
    """A process that renders."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.seconds, self.memory = SECONDS, MEMORY
        self.replied = False
        self.numbers: dict[str, int] = {}
        """Of the templates that it has."""
        # no tokens and keys; what an interpreter may need to start
        environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-P", template_process.__file__, str(self.seconds), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the command, which may ignore it, as after `&` in a script
            env=environment,
        )

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        number = self.numbers.get(template)
        source = template if number is None else None
        number = self.numbers.setdefault(template, len(self.numbers))
        assert self.process.stdin and self.process.stdout
        try:
            template_process.write(self.process.stdin, _encoded(number, source, variables))
            reply = template_process.read(self.process.stdout)
        except BrokenPipeError:
            reply = None
        if reply is None:
            if not self.replied and (code := self.process.wait()) > 0:
                what = f"the process that renders chat templates does not start (exit code {code})"
                raise PedigreeError(what, f"see what `{sys.executable} -c 'import jinja2'` prints")
            raise TemplateLimit(f"the chat template {self._end()}", HINT)
        self.replied = True
        kind, text = reply[:1], reply[1:].decode("utf-8", "surrogatepass")
        if kind == template_process.LIMIT:
            raise TemplateLimit(f"the chat template {text}", HINT)
        if kind == template_process.ERROR:
            raise Refused(text)
        return text

    def _end(self) -> str:
        """What the template did, as it ended the process."""
        code = self.process.wait()
        if code == -signal.SIGPROF:
            return f"takes more than {self.seconds:g} s of processor time"
        return f"ends the process that renders it (exit code {code})"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            with suppress(BrokenPipeError):
                stream.close()


def _encoded(number: int, source: str | None, variables: Mapping[str, Any]) -> bytes:
    try:
        return marshal.dumps((number, source, dict(variables)))
    except ValueError:  # a subclass of a type
        return marshal.dumps((number, source, json.loads(json.dumps(dict(variables)))))


HINT = "fix the template, or use another one, e.g. base_model.chat_template: hermes"
_lock = threading.Lock()
_renderer: _Renderer | None = None
_excluded: dict[str, str] = {}
"""Template -> the limit that it exceeded."""


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Render a chat template.

    Args:
        variables: of types that JSON has.
    Raises:
        Refused: the template raises an error.
        TemplateLimit: it exceeds a limit, now or before in this process.
    """
    global _renderer
    if template in _excluded:
        raise TemplateLimit(_excluded[template], HINT)
    with _lock:
        if _renderer is None or _renderer.owner != os.getpid() or _renderer.process.poll() is not None:
            _renderer = _Renderer()
        try:
            return _renderer.render(template, variables)
        except Refused:
            raise
        except BaseException as error:  # also Ctrl-C: the next reply would be that to this request
            _renderer.close()
            _renderer = None
            if isinstance(error, TemplateLimit):
                _excluded[template] = error.what
            raise
