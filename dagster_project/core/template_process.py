"""The process that renders chat templates, which are code of strangers. It is run as a file and imports jinja2 alone.

Jinja's sandbox limits what a template may read, not how long it runs or how much memory it takes: the operating system
does. Requests and replies are frames of stdin and stdout: their length in 8 bytes, then their content.
"""

from __future__ import annotations

import json
import marshal
import os
import resource
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import IO, Any

TEXT, ERROR, LIMIT = b"t", b"e", b"l"
"""Kind of a reply: the rendered text, why the template refuses the conversation, or why it is never rendered again."""
SECONDS_PER_REQUEST, SECONDS_PER_BYTE = 0.05, 1e-6
"""Processor seconds by which the remaining time grows with each request, up to the limit. Templates of models take
about a hundredth."""
MAX_TEMPLATE = 1 << 20
"""Maximum characters of a template. Those of models have up to 30,000."""
MAX_GROWTH, FREE_TEXT = 16, 1 << 20
"""Maximum ratio of rendered characters to bytes of a request, above as many characters."""


def write(stream: IO[bytes], content: bytes) -> None:
    """Write a frame."""
    stream.write(len(content).to_bytes(8, "little"))
    stream.write(content)
    stream.flush()


def read(stream: IO[bytes]) -> bytes | None:
    """Read a frame; None at the end of the stream."""
    header = stream.read(8)
    if len(header) < 8:
        return None
    content = stream.read(size := int.from_bytes(header, "little"))
    return content if len(content) == size else None


def compiled(chat_template: str) -> Any:
    """A chat template in the environment of transformers: sandboxed, with the same options, filters and functions.

    Raises:
        jinja2.TemplateError: it is not a template.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text; it renders as its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> Any:
            return caller()

    class SafeNamespace(Namespace):
        """Refuses names that begin with an underscore, which give access to Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name in the template
            names = dict(*args[1:], **kwargs)
            for name in names:
                SafeNamespace.check(name)
            Namespace.__init__(args[0], names)

        def __setitem__(self, name: str, value: Any) -> None:
            SafeNamespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(
                    "Chat templates cannot store underscore-prefixed attributes on a namespace,"
                    f" but got {name!r}. Please rename the attribute."
                )

    class SafeDict:
        """`dict` without the attributes of a class."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args, **kwargs)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": SafeDict(),
        "namespace": SafeNamespace,
    }
    return environment.from_string(chat_template)


def _limit(memory: int) -> None:
    """Limit this process: additional memory in bytes, no written file, and three open files for late imports."""
    used = Path("/proc/self/statm")
    if used.exists():
        most = int(used.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))


def _reply(request: bytes, templates: dict[int, Any], memory: int) -> bytes:
    """Render one request; returns the frame of the reply.

    Args:
        request: number and text of a template (None if it was sent before), and its variables.
        templates: those compiled so far.
        memory: the limit, for messages.
    """
    from jinja2 import TemplateError

    number, source, variables = marshal.loads(request)
    try:
        if source is not None:
            if len(source) > MAX_TEMPLATE:
                return LIMIT + f"has more than {MAX_TEMPLATE:,} characters".encode()
            templates[number] = compiled(source)
        text = templates[number].render(**variables)
        most = FREE_TEXT + MAX_GROWTH * len(request)
        if len(text) > most:
            return LIMIT + f"writes more than {most:,} characters for a conversation of {len(request):,} bytes".encode()
        return TEXT + text.encode("utf-8", "surrogatepass")
    except MemoryError:
        return LIMIT + f"needs more than {memory / 2**30:g} GiB of memory".encode()
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error)[:MAX_TEMPLATE].split()) or type(error).__name__
        return ERROR + reason.encode("utf-8", "backslashreplace")


def main(seconds: float, memory: int) -> None:
    """Reply to requests until stdin ends.

    Args:
        seconds: processor time that templates may take. A longer one ends this process by SIGPROF, also in the middle
            of an operation.
        memory: in bytes.
    """
    import jinja2.sandbox  # noqa: F401  before the limits apply

    compiled("{{ 'a' | tojson }}").render()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, whose end of the pipe closes
    _limit(memory)
    templates: dict[int, Any] = {}
    left = seconds
    while (request := read(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, left)
        reply = _reply(request, templates, memory)
        remaining = signal.setitimer(signal.ITIMER_PROF, 0)[0]
        left = min(seconds, remaining + SECONDS_PER_REQUEST + SECONDS_PER_BYTE * len(request))
        write(replies, reply)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
