"""CPU seconds of checks on texts that are made to be slow. usage: python
benchmarks/slow_texts.py [--megabytes N] [--checks NAME ...] [--unit TEXT]

A text repeats one unit: the beginning of a value that a check searches for, a value, or what
separates values. Each check reads each text in this process, with one thread; the table has
the seconds of each, the slowest first. Exit code 1 if one takes more than `SECONDS`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

for name in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

from dagster_project.curation.checks import content, damage, privacy  # noqa: E402  after the number of threads
from dagster_project.curation.similarity import overlap  # noqa: E402

SECONDS = 2.0
"""CPU seconds that a check may take for 16 MB of text."""
UNITS = (
    "a", " ", "é", "1", "1 ", "1-", "1.", "a.", "a b ", "word by word, ", "the cat sat on the mat. ", "[", "]", "%",
    "x\n", "\n", "\t", "?", "0 0 0 ", "ab1 ",
    # secrets: beginnings, whole ones, and what surrounds them
    "eyJ", "eyJa.", "eyJa.b.", "eyJhIjoxfQ.", "://", "://a:", "://a:b@", "://u:pw1@h ", "aws", "aws key = ",
    "aws_secret", "AKIA", "ASIA0123456789ABCDEF ", "A3TX", "pypi-A", "SG.", "SG.a", "xoxb-", "xoxb-1-2-",
    "hooks.slack.com/services", "sq0csp-", "rk_live_", "12345678:", "AC", "sk-ant-", "AIza", "hf_",
    "hf_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ", "PRIVATE KEY", "-----BEGIN PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\n", "BEGIN ENCRYPTED PRIVATE KEY:", "PuTTY-User-Key-File-2: ", "T3BlbkFJ",
    "sk-aT3BlbkFJ", "gl", "glpat-", "GR1348941", "_authToken=", "ghp_", "github_pat_", "AccountKey=", "M",
    "MMMMMMMMMMMMMMMMMMMMMMMM.aaaaaa.", "0123456789abcdef0123456789abcdef-us", "0123456789abcdef",
    # personal data
    "@", "a@b.", "a@b.c", "ann@exam.ple ", "ä@ä.ä", "DE12", "DE12 ", "DE12 3456", "4", "4 ", "41 ", "4111 ",
    "4111111111111111 ", "+1 ", "+49 ", " +49 30 1234567 ", "(0", "tel ", "tel: 0", "123-45-6789 ", "1123-45-67890 ",
    "123.", "1.2.3.4", "1.1.1.", "2001:", "2001:0:", "1 12 12 12", "ABCDEF12A12", "XYZ1234567A", "12345678A ",
    "030 123456 ", "tel 1234567890123 ", "call 1 2 3 4 5 6 7 8 9 0 1 2 3 ", "+1 (2) 3-4.5 6 7 8 9 0 1 2 3 4 5 6 ", "//",
    "//a/:_authToken= ",
    # damage, content, tool calls
    "<s>", "</s>", "<s>a</s>", "<|im_start|>", "Ã©", "Ã", "\u200b", "a\u0301", "\ufffd", "[INST]", "User: ", "\nUser:",
    "### Instruction:\n", "I'm sorry, but ", "As an AI ", "[your name] ", "{{", "<div>", "<div ", "&nbsp;", "<!--",
    "```", "`a", "- a\n", "{", "[{", '{"a":', "<tool_call>", "I am made by ", "\u4e00", "\U0001f3f4\U000e0067",
    "\ud800",
)  # fmt: skip


def _near_duplicates(text: str) -> None:
    list(overlap.near_pairs([text, text[: len(text) // 16]]))


def _content(text: str) -> None:
    answers = [{"role": "user", "content": "Where does the river begin?"}, {"role": "assistant", "content": text}]
    prompts = [{"role": "user", "content": text}, {"role": "assistant", "content": "In the hills, they say."}]
    content.content_facts([{"messages": answers}, {"messages": prompts}])


def _damage(text: str) -> None:
    for check in (damage.damage, damage.template_marks, damage.hidden, damage.decomposed):
        check([text])


CHECKS: dict[str, Callable[[str], object]] = {
    "private values": lambda text: privacy.scan([text]),
    "masking": privacy.mask,
    "damage": _damage,
    "content": _content,
    "near duplicates": _near_duplicates,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(" usage")[0])
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=[*CHECKS])
    parser.add_argument("--unit", action="append", help="repeat these instead")
    options = parser.parse_args()
    size = int(options.megabytes * 1e6)
    for check in options.checks:
        CHECKS[check]("a@b.cd 4111111111111111 I am " * (overlap.SMALL // 20))  # loads and compiles
    rows = []
    for unit in options.unit or UNITS:
        text = unit * (size // len(unit.encode("utf-8", "surrogatepass")))
        for check in options.checks:
            began = time.process_time()
            CHECKS[check](text)
            rows.append((time.process_time() - began, check, unit))
            print(f"{rows[-1][0]:8.2f} {check:<16} {unit!r}", file=sys.stderr, flush=True)
    rows.sort(reverse=True)
    for seconds, check, unit in rows[:40]:
        print(f"{seconds:8.2f} {check:<16} {unit!r}")
    slow = sum(seconds > SECONDS for seconds, _, _ in rows)
    print(f"{slow} of {len(rows)} take more than {SECONDS:g} CPU seconds for {options.megabytes:g} MB")
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
