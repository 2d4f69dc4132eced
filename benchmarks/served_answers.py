"""Greedy answers of a model through `pedigree serve` and by `pedigree chat`,
for the same test prompts: how many are equal, and the first difference.

Run in a project: python benchmarks/served_answers.py [MODEL] [--prompts N]
[--project FOLDER]. Starts the server itself, on a free port.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from dagster_project.commands.chat import Decoding, find_model, load
from dagster_project.core.records import read_records

LONGEST = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="release")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--project", type=Path, default=Path())
    options = parser.parse_args()
    root = options.project.resolve()
    prompts = [record["messages"][:-1] for record in read_records(root / "data/splits/test")][: options.prompts]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [
        str(Path(sys.executable).parent / "pedigree"),
        "serve",
        options.model,
        "--port",
        port,
        "--json",
        "--project",
        str(root),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        served = json.loads(server.stdout.readline())
        answers = [ask(served, messages) for messages in prompts]
    finally:
        server.terminate()
        server.wait()
    name, folder = find_model(root, options.model)
    speaker = load(root, name, folder)
    expected = []
    for messages in prompts:
        speaker.messages = messages[:-1]
        expected.append(
            speaker.ask(messages[-1]["content"], None, Decoding(LONGEST), lambda _: None).message["content"]
        )
    equal = sum(a == b for a, b in zip(answers, expected, strict=True))
    print(
        f"{served['model']} by {served['engine']}, {speaker.model.model.dtype}: {equal} of {len(prompts)} greedy"
        " answers are equal"
    )
    for messages, a, b in zip(prompts, answers, expected, strict=True):
        if a != b:
            print(json.dumps({"prompt": messages[-1]["content"], "served": a, "chat": b}, ensure_ascii=False))


def ask(served: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    """The answer by the official client, streamed."""
    from openai import OpenAI

    client = OpenAI(base_url=served["url"], api_key="none", timeout=600)
    given = [{key: message[key] for key in ("role", "content")} for message in messages]
    how = {"temperature": 0, "max_tokens": LONGEST, "stream": True, "extra_body": served["request"]}
    chunks = client.chat.completions.create(model=served["model"], messages=given, **how)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()


if __name__ == "__main__":
    main()
