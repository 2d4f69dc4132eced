"""Records -> one table with a fact per check and row, and the schema that validates it.

Each check on rows is one object in `ROW_CHECKS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from dagster_project.core import row_cache
from dagster_project.core.imports import import_pandera
from dagster_project.core.messages import JSON, Messages, Tools, calls, conversation_text, is_trained
from dagster_project.core.stored_rows import Selected, decode
from dagster_project.core.text import many
from dagster_project.curation.checks.check import Check, DataSet, Limits, Rows, is_true, kinds, named_text_of
from dagster_project.curation.checks.content import CONTENT_CHECKS
from dagster_project.curation.checks.damage import damage, decomposed, hidden, template_marks
from dagster_project.curation.checks.overlaps import GROUPED, find_overlaps, first_overlap
from dagster_project.curation.checks.privacy import scan
from dagster_project.curation.checks.source_checks import SOURCE_CHECKS
from dagster_project.curation.checks.token_counts import Tokens
from dagster_project.curation.checks.tool_checks import TOOL_CHECKS
from dagster_project.curation.similarity.overlap import words
from dagster_project.curation.sources.formats import is_text

if TYPE_CHECKING:
    import pandera.polars as pa
    import polars as pl

PLACEHOLDERS = frozenset(
    {
        "no input", "noinput", "none", "n a", "na", "null", "nil", "empty", "not applicable", "no input provided",
        "no input required", "no input needed", "no additional input", "input not available", "placeholder", "todo",
        "tbd", "lorem ipsum",
    }
)  # fmt: skip
"""Inputs that only say that there is none, after `words` has removed case and punctuation ("<noinput>", "N/A", "No
input.")."""
MAX_RENDERED = 20_000
"""Maximum number of rows whose chat template is rendered; in a larger set each conversation shape in turn. `tokenized`
renders every row."""


def row_schema(limits: Limits) -> pa.DataFrameSchema:
    """The type of each column of `gather`, and the condition on its values."""
    return _schema([check for check in _ROW_CHECKS if check.column], limits)


def _schema(checks: Sequence[Check], limits: Limits) -> pa.DataFrameSchema:
    pa = import_pandera()

    return pa.DataFrameSchema({check.name: check.holds(limits, check.name) for check in checks}, strict=True)


def gather(rows: Rows, schema: pa.DataFrameSchema) -> pl.DataFrame:
    """The facts that depend on one record each: one row per record, in order, and one column per check."""
    import polars as pl

    columns = []
    for check in _ROW_CHECKS:
        if check.column:
            dtype = schema.columns[check.name].dtype.type
            columns.append(pl.Series(check.name, check.column(rows, check.name), dtype=dtype))
    return pl.DataFrame(columns)


def violations(frame: pl.DataFrame, schema: pa.DataFrameSchema) -> dict[str, dict[int, Any]]:
    """Check name -> index of each row that violates it, in order -> its fact.

    The frame is eager, because pandera skips data checks on lazy frames.
    """
    pa = import_pandera()

    found: dict[str, dict[int, Any]] = {}
    try:
        schema.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        broken = cases.filter(cases["index"].is_null())
        if len(broken):
            raise AssertionError(f"the facts table itself is wrong: {broken.to_dicts()}") from None
        for (name,), rows in cases.select("check", "index").group_by("check", maintain_order=True):
            indices = sorted(set(rows["index"].to_list()))
            found[str(name)] = dict(zip(indices, frame[str(name)].gather(indices).to_list(), strict=True))
    return found


def set_violations(data: DataSet) -> dict[str, dict[int, Any]]:
    """As `violations`, of the facts that depend on several records."""
    import polars as pl

    found: dict[str, dict[int, Any]] = {}
    for check in _ROW_CHECKS:
        facts = dict(sorted(check.of_set(data, check.name).items())) if check.of_set else {}
        if facts:
            rows, texts = [*facts], pl.DataFrame({check.name: pl.Series([*facts.values()], dtype=pl.String)})
            for name, of in violations(texts, _schema([check], data.limits)).items():
                found[name] = {rows[i]: fact for i, fact in of.items()}
    return found


# --- messages


def _problem(rows: Rows, _: str) -> list[str | None]:
    """The reason that each source row could not be read, else null."""
    problems: list[str | None] = []
    for record, meta in zip(rows.records, rows.metas, strict=True):
        is_read = record["messages"] or not record.get("same_prompt", True) or meta.get("unsupported") is True
        problems.append(None if is_read else meta.get("problem"))
    return problems


def _is_half(record: Mapping[str, Any]) -> bool:
    """Whether a pair has only one side: a KTO row without a counterpart."""
    if "rejected" not in record or not record["messages"]:
        return False
    return len(record["messages"]) <= record["asked"] or not record["rejected"]


def _roles_are_valid(record: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
    """Whether it is plain text, or user and assistant take turns, the user first, after an optional system turn.

    Tool results may follow a turn of the assistant, which then continues. In a pair this holds for both sides.
    """
    return all(is_text(side, meta) or _in_turns(tuple([m["role"] for m in side])) for side in sides(record))


_BEFORE = {
    "user": {"system", "assistant", ""},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
    "system": {""},
}


@lru_cache
def _in_turns(roles: tuple[str, ...]) -> bool:
    follow = zip(("", *roles), roles, strict=False)
    return set(roles) != {"system"} and all(last in _BEFORE.get(role, ()) for last, role in follow)


def valid_roles(rows: Rows) -> list[bool]:
    return [_roles_are_valid(record, meta) for record, meta in zip(rows.records, rows.metas, strict=True)]


def _ends_with_assistant(record: Mapping[str, Any]) -> bool:
    if not record["messages"] or _is_half(record):
        return True
    return all(side[-1]["role"] == "assistant" for side in sides(record))


def _have_prompt(rows: Rows, _: str) -> list[bool]:
    return [
        not r["messages"] or bool(prompt.strip()) or is_text(r["messages"], meta)
        for r, meta, prompt in zip(rows.records, rows.metas, rows.prompts, strict=True)
    ]


def _has_response(record: Mapping[str, Any]) -> bool:
    """Whether every answer has content, except for those of weight 0 that others follow: they are not trained on."""
    for side in (record["messages"][record.get("asked", 0) :], record.get("rejected") or ()):
        for i, message in enumerate(side, 1):
            is_answer = message["role"] == "assistant" and (is_trained(message) or i == len(side))
            if is_answer and not _has_content(message):
                return False
    return True


def _has_content(message: Mapping[str, Any]) -> bool:
    """Whether an answer has text, or calls a tool. Reasoning alone is not an answer."""
    return bool(message["content"].strip()) or "tool_calls" in message


def inputs_of(record: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> list[str]:
    """The texts that a user gives: the input of an Alpaca row, which ends a user turn, and the user turns before the
    first answer. A later turn is a reply, and may well be "None".

    Args:
        meta: of the record, if it is parsed already.
    """
    if meta is None:
        meta = json.loads(record["meta"]) if '"input"' in record["meta"] else {}
    given, turns = meta.get("input"), [m["content"] for m in record["messages"] if m["role"] == "user"]
    is_asked = isinstance(given, str) and any(turn.endswith(f"\n\n{given}") for turn in turns)
    first = takewhile(lambda message: message["role"] != "assistant", record["messages"])
    return [*([given] if is_asked else []), *(m["content"] for m in first if m["role"] == "user")]


def is_placeholder(text: str) -> bool:
    return len(text) < 40 and " ".join(words(text)) in PLACEHOLDERS


def _inputs_are_real(rows: Rows, _: str) -> list[bool]:
    return [
        not any(is_placeholder(text) for text in inputs_of(r, meta))
        for r, meta in zip(rows.records, rows.metas, strict=True)
    ]


def _of_record(holds: Callable[[Mapping[str, Any]], bool]) -> Callable[[Rows, str], list[bool]]:
    """A column that depends only on the record."""
    return lambda rows, _: [holds(record) for record in rows.records]


def _of_text(find: Callable[[Sequence[str]], list[str | None]]) -> Callable[[Rows, str], list[str | None]]:
    """A column that depends only on the record's text."""
    return lambda rows, _: find(rows.texts)


# --- pairs


def _sides_differ(record: Mapping[str, Any]) -> bool:
    messages, rejected = record["messages"], record.get("rejected")
    return not rejected or not messages or not _sides_are_equal(messages[record["asked"] :], rejected)


def _sides_are_equal(chosen: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two sides have the same calls and the same text.

    Except for case, white space, Unicode form and the final period; in code except for white space at line ends.
    """
    if len(chosen) != len(rejected):
        return False
    both_sides = [*zip(chosen, rejected, strict=True)]
    if any(a["role"] != b["role"] or _call_values(a) != _call_values(b) for a, b in both_sides):
        return False
    texts = [(a["content"], b["content"]) for a, b in both_sides]
    traces = [(a.get("reasoning_content") or "", b.get("reasoning_content") or "") for a, b in both_sides]
    code = any("```" in text for both in texts for text in both) or all(_INDENTED.search(text) for text in texts[-1])
    plain = _code_form if code else _plain_form
    return all(plain(a) == plain(b) for a, b in (*texts, *traces))


def _call_values(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(call.name, call.arguments) for call in calls(message)]


_INDENTED = re.compile(r"\n(?: {4}|\t)")


def _plain_form(text: str) -> str:
    plain = " ".join(normalize("NFKC", text).casefold().split())
    return plain.rstrip(".!\u3002\u2026 ") or plain


def _code_form(text: str) -> str:
    return "\n".join(line.rstrip() for line in normalize("NFC", text).strip("\n").split("\n"))


# --- tokens and template


def _conversation_tokens(rows: Rows, _: str) -> list[int | None]:
    """Tokens of each conversation as the template writes it (for a pair the longer one).

    Null if the text is too short to reach the limit: a token has at least one byte.
    """
    records, most = rows.records, rows.limits.max_tokens
    texts = [_longest(record) for record in records] if any("rejected" in r for r in records) else [*rows.texts]
    for i in rows.rich:
        texts[i] = _longest(records[i])
    counted: list[int | None] = [None] * len(texts)
    possible = [(i, text) for i, text in enumerate(texts) if 4 * len(text) >= most]
    long = [i for i, text in possible if len(text) >= most or len(text.encode("utf-8", "replace")) >= most]
    for i, count in zip(long, rows.limits.tokens.count([texts[i] for i in long]), strict=True):
        counted[i] = count
    if not (rendered := rows.limits.tokens.rendered):
        return counted
    for i, record in enumerate(records):
        if record.get("rejected") and record["messages"]:
            written = [n for side in sides(record) if (n := rendered(side, record.get("tools"))) is not None]
            counted[i] = max(written, default=counted[i])
    return counted


def _longest(record: dict[str, Any]) -> str:
    """The conversation with its tools; for a pair the longer one of its two conversations."""
    tools: Tools = record.get("tools")
    return max((conversation_text(side, tools) for side in sides(record)), key=len)


def sides(record: Mapping[str, Any]) -> list[Messages]:
    """The conversation; for a pair those with the chosen and with the rejected answer."""
    messages = record["messages"]
    return [messages, [*messages[: record["asked"]], *record["rejected"]]] if record.get("rejected") else [messages]


def _response_tokens(rows: Rows, _: str) -> list[int | None]:
    """Tokens of each last response; null if it is empty, certainly long enough, has reasoning or calls a tool.

    A token of prose has at most 16 characters.
    """
    counted: list[int | None] = [None] * len(rows.responses)
    most = 16 * rows.limits.min_response_tokens
    last = [(i, message) for i in rows.rich for message in rows.records[i]["messages"][-1:]]
    more = {i for i, message in last if message.get("reasoning_content") or message.get("tool_calls")}
    short = [i for i, text in enumerate(rows.responses) if len(text) <= most and text.strip() and i not in more]
    for i, n in zip(short, rows.limits.tokens.count([rows.responses[i] for i in short]), strict=True):
        counted[i] = n
    return counted


def _at_most_max_tokens(limits: Limits, name: str) -> pa.Column:
    pa = import_pandera()
    import polars as pl

    return pa.Column(pl.Int64, pa.Check.le(limits.max_tokens, error=name), nullable=True)


def _at_least_min_response_tokens(limits: Limits, name: str) -> pa.Column:
    pa = import_pandera()
    import polars as pl

    return pa.Column(pl.Int64, pa.Check.ge(limits.min_response_tokens, error=name), nullable=True)


def _too_long_note(data: DataSet, counts: Sequence[int]) -> list[str]:
    most, note = data.limits.max_tokens, _estimated(data)
    if not counts:
        return note
    return [f"{sum(counts):,} tokens in all, {sum(n - most for n in counts):,} beyond {most:,} each", *note]


def _short_note(data: DataSet, counts: Sequence[int]) -> list[str]:
    few, note = data.limits.min_response_tokens, _estimated(data)
    return [f"fewer than {few} tokens each, {sum(counts):,} in all", *note] if counts else note


def _estimated(data: DataSet) -> list[str]:
    return ["tokens estimated at four bytes each: no base model available"] if data.limits.tokens.estimated else []


def marks(rows: Rows) -> list[str | None]:
    """Includes definitions of tools, because the template writes them into the prompt."""
    texts = [*rows.texts]
    for i in rows.rich:
        if tools := rows.records[i].get("tools"):
            texts[i] += f"\n{JSON.encode(tools)}"
    return template_marks(texts, rows.limits.tokens.special)


def _control_tokens(rows: Rows, _: str) -> list[str | None]:
    """Control tokens and boilerplate of chat templates.

    Quoted transcripts ("Human: ... Assistant: ...") are allowed: people write them.
    """
    return [None if mark and mark.startswith("transcript") else mark for mark in rows.shared(marks)]


def _transcripts_note(data: DataSet, _: Sequence[str]) -> list[str]:
    transcripts = data.features.transcripts
    kept = many(transcripts, "row quotes a transcript; it is kept", "rows quote a transcript; they are kept")
    return [kept] if transcripts else []


def _template_mismatches(data: DataSet, _: str) -> dict[int, str]:
    """The reason that each conversation does not fit the chat template.

    A template's behavior depends on roles and on white space around the contents.
    """
    import polars as pl

    if data.limits.tokens.misfit is None:
        return {}
    shapes = data.features.table.lazy().select("shape").with_row_index("row").filter(pl.col("shape") != 0)
    share = max(1, MAX_RENDERED // max(1, shapes.select(pl.col("shape").n_unique()).collect().item()))
    rows = shapes.filter(pl.int_range(pl.len()).over("shape") < share).collect()["row"].to_list()
    tokens = data.limits.tokens
    facts = row_cache.facts(_misfits, tokens, Selected(data.records, rows), tokens.identity and [tokens.identity])
    return {i: json.loads(reason) for i, reason in zip(rows, facts["reason"].to_list(), strict=True) if reason}


def _misfits(tokens: Tokens, lines: Sequence[bytes]) -> pl.DataFrame:
    """For each record the `reason` that the chat template does not fit, as JSON."""
    import polars as pl

    misfit, reasons = tokens.misfit, []
    assert misfit
    for record in map(decode, lines):
        reason = next(filter(None, (misfit(side, record.get("tools")) for side in sides(record))), None)
        reasons.append(json.dumps(reason) if reason else None)
    return pl.DataFrame({"reason": pl.Series(reasons, dtype=pl.String)})


# --- values and overlaps


def _private_values(rows: Rows) -> dict[bool, list[str | None]]:
    """For each text the first secret (key True) or personal data (key False): its kind, and masked words around it."""
    found: dict[bool, list[str | None]] = {secret: [None] * len(rows.texts) for secret in (True, False)}
    texts = [*rows.texts]
    for i in rows.rich:
        texts[i] = named_text_of(rows.records[i])
    for hit in scan(texts):
        column = found[hit.secret]
        column[hit.row] = column[hit.row] or f"{hit.kind}: {hit.excerpt}"
    return found


def _leak_note(data: DataSet, _: Sequence[str]) -> list[str]:
    if not data.held_out:
        return ["nothing held out to compare with"]
    overlaps = data.shared(find_overlaps)
    links, frames = overlaps.links["benchmark_leakage"], overlaps.common_frames
    copied = {link.row for link in links if not link.partial}
    partly = {link.row for link in links} - copied
    copies = many(len(copied), "row copies held-out text", "rows copy held-out text")
    note = [f"{copies}, {many(len(partly), 'overlaps it in part', 'overlap it in part')}"] if partly else []
    pairs = many(frames, "pair shares", "pairs share")
    what = "is not a leak" if frames == 1 else "are not leaks"
    return [*note, f"{pairs} only a common phrase and {what}"] if frames else note


def _near_copies_note(data: DataSet, _: Sequence[str]) -> list[str]:
    overlaps = data.shared(find_overlaps)
    note = []
    if overlaps.compared.boilerplate:
        first, *others = overlaps.compared.boilerplate
        more = f" and {len(others)} more" if others else ""
        note = [f"boilerplate, which is not compared: {first.words} words in {first.texts} prompts{more}"]
    if grouped := overlaps.links[GROUPED]:
        pairs = many(len(grouped), "pair is less similar, or has", "pairs are less similar, or have")
        note.append(f"{pairs} another question: they share a group_id and are not reported")
    return note


_ROW_CHECKS: tuple[Check, ...] = (
    Check(
        "malformed_row",
        "Every row can be read in its format.",
        "error",
        "Fix the rows; rows are counted from 0, lines from 1.",
        column=_problem,
    ),
    *SOURCE_CHECKS,
    Check(
        "unpaired_answer",
        "Every answer labeled good or bad has a counterpart to the same prompt.",
        "warn",
        "Add an answer of the other kind to the same prompt: alignment learns from pairs.",
        column=_of_record(lambda record: not _is_half(record)),
        holds=is_true,
        kind="preferences",
    ),
    Check(
        "unlabelled",
        "Every benchmark question has its answer.",
        "error",
        "Use the split of the benchmark that has labels.",
        column=_of_record(lambda record: record.get("labelled", True)),
        holds=is_true,
        kind="benchmark",
    ),
    Check(
        "invalid_roles",
        "Roles are system (optional), then user and assistant in turns.",
        "error",
        "Put the turns in order, or name the right format.",
        column=lambda rows, _: [
            not r["messages"] or valid for r, valid in zip(rows.records, rows.shared(valid_roles), strict=True)
        ],
        holds=is_true,
    ),
    Check(
        "ends_on_user_turn",
        "Every conversation ends with the assistant's answer.",
        "error",
        "Add the answer, or remove the last question.",
        column=_of_record(_ends_with_assistant),
        holds=is_true,
    ),
    Check(
        "empty_prompt",
        "Every prompt has text.",
        "error",
        "Write the prompt, or take the row out.",
        column=_have_prompt,
        holds=is_true,
    ),
    Check(
        "empty_response",
        "Every response has text.",
        "error",
        "Write the response, or take the row out.",
        column=_of_record(_has_response),
        holds=is_true,
    ),
    *TOOL_CHECKS,
    Check(
        "placeholder_input",
        "No input merely says that there is none.",
        "warn",
        "Leave the input empty instead.",
        "fix",
        column=_inputs_are_real,
        holds=is_true,
    ),
    Check(
        "prompt_mismatch",
        "Chosen and rejected answer the same prompt; if they have several turns, only the last one may differ.",
        "error",
        "Pair answers to one prompt.",
        column=_of_record(lambda record: record.get("same_prompt", True)),
        holds=is_true,
        kind="preferences",
    ),
    Check(
        "identical_pair",
        "Chosen and rejected differ in more than case, white space, Unicode form or the final stop.",
        "error",
        "Remove the pair: it has no effect on training.",
        column=_of_record(_sides_differ),
        holds=is_true,
        kind="preferences",
    ),
    Check(
        "tied_pair",
        "One of chosen and rejected is better.",
        "warn",
        "Remove ties, or have them rated again.",
        column=_of_record(lambda record: record.get("margin") != 0),
        holds=is_true,
        kind="preferences",
    ),
    Check(
        "short_response",
        "No response is too short to teach anything.",
        "info",
        "Read a few; lower `min_response_tokens` if short answers are intended.",
        "warn",
        column=_response_tokens,
        holds=_at_least_min_response_tokens,
        note=_short_note,
    ),
    Check(
        "too_long",
        "Every example fits into `max_tokens` tokens of the base model.",
        "warn",
        "Shorten or divide them, or raise `max_tokens` (of preferences `max_length`).",
        "warn",
        column=_conversation_tokens,
        holds=_at_most_max_tokens,
        note=_too_long_note,
    ),
    Check(
        "special_tokens_in_text",
        "No text contains control tokens of a chat template.",
        "error",
        "Remove the markers from the text; the template adds its own.",
        "fix",
        column=_control_tokens,
        quotes=True,
        note=_transcripts_note,
    ),
    Check(
        "template_mismatch",
        "Every conversation fits the base model's chat template.",
        "error",
        "Use the roles that the template supports, or another template.",
        of_set=_template_mismatches,
        note=kinds,
    ),
    Check(
        "hidden_characters",
        "No text contains a byte order mark or zero-width characters without effect.",
        "info",
        "Remove them: they split words into other tokens, and hide copies.",
        "fix",
        column=_of_text(hidden),
        quotes=True,
        note=kinds,
    ),
    Check(
        "unicode_form",
        "Every text is in Unicode's composed form (NFC).",
        "info",
        "Compose it: a model reads the same word in two forms as two words.",
        "fix",
        column=_of_text(decomposed),
        quotes=True,
        note=kinds,
    ),
    Check(
        "encoding",
        "No text shows encoding damage.",
        "warn",
        "Read the file again in its true encoding, and save it as UTF-8.",
        column=_of_text(damage),
        quotes=True,
        note=kinds,
    ),
    Check(
        "secrets",
        "No text contains a password, key or token.",
        "error",
        "Revoke the secret, then remove it from the source: a model can reproduce it.",
        column=lambda rows, _: rows.shared(_private_values)[True],
        quotes=True,
        note=kinds,
    ),
    Check(
        "pii",
        "No text holds personal data such as an e-mail address or a card number.",
        "warn",
        "Set the policy `pii: fix` to put placeholders such as [EMAIL] in its place, or take the row out.",
        column=lambda rows, _: rows.shared(_private_values)[False],
        quotes=True,
        note=kinds,
    ),
    *CONTENT_CHECKS,
    Check(
        "exact_duplicates",
        "No two rows are identical.",
        "warn",
        "Nothing to do: one of them is kept.",
        of_set=first_overlap,
    ),
    Check(
        "benchmark_leakage",
        "No row overlaps a held-out benchmark.",
        "error",
        "Take the row out of the source, or waive it if the overlap is a common phrase.",
        of_set=first_overlap,
        note=_leak_note,
    ),
    Check(
        "split_leakage",
        "No row, nor a near-copy of it, is in two splits.",
        "error",
        "Remove it from the training split; `splits` does so.",
        "warn",
        of_set=first_overlap,
    ),
    Check(
        "conflicting_responses",
        "The same prompt never has two different responses.",
        "warn",
        "Keep the right one; in the pipeline, decide in the review file.",
        "review",
        of_set=first_overlap,
    ),
    Check(
        "near_duplicates",
        "No two prompts are nearly the same.",
        "warn",
        "Read the pairs. They share a `group_id`, so `splits` keeps them together.",
        "warn",
        of_set=first_overlap,
        note=_near_copies_note,
    ),
)
"""In the order of evaluation: a row is dropped by the first check that it violates."""
ROW_CHECKS = {check.name: check for check in _ROW_CHECKS}
