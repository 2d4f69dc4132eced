"""Records -> faults in their content: refusals, foreign identities, placeholders, echoes, cut ends, loops, markup.

Each check is one object in `CONTENT_CHECKS`. Checks work on exchanges: an answer of the assistant with the messages
before it; for a preference pair only the chosen answer. Each has two steps: `pretest`, cheap, over all exchanges at
once, and `find`, on the remaining ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dagster_project.core.messages import calls
from dagster_project.core.words import WITHOUT_SPACES
from dagster_project.curation.checks.check import Action, Check, DataSet, Rows, Values, kinds
from dagster_project.curation.checks.damage import visible
from dagster_project.curation.checks.privacy import mask
from dagster_project.curation.checks.profile import scripts
from dagster_project.curation.checks.text_search import first_match, text_column, without_matches

if TYPE_CHECKING:
    import polars as pl
    from py3langid.langid import LanguageIdentifier

AROUND = 30
"""Characters shown on each side of a match."""


class Exchange(NamedTuple):
    """One answer of the assistant."""

    asked: str
    """The previous message if it is the user's, else the empty string."""
    said: str
    messages: Sequence[Mapping[str, Any]]
    """The whole conversation."""
    at: int
    """Index of the answer in `messages`."""

    @property
    def before(self) -> str:
        """All messages before the answer, including the system prompt."""
        return "\n".join([m["content"] for m in self.messages[: self.at]])


@dataclass(frozen=True)
class Texts:
    """All exchanges in columns."""

    rows: list[int]
    """Index of the record."""
    places: list[int]
    """Index of the answer in the record's messages."""
    asked: list[str]
    said: list[str]

    def exchange(self, i: int, records: Sequence[Mapping[str, Any]]) -> Exchange:
        return Exchange(self.asked[i], self.said[i], records[self.rows[i]]["messages"], self.places[i])

    @cached_property
    def asked_column(self) -> pl.Series:
        return text_column(self.asked)

    @cached_property
    def asked_lower(self) -> pl.Series:
        return self.asked_column.str.to_lowercase()

    @cached_property
    def said_column(self) -> pl.Series:
        return text_column(self.said)


Match = tuple[str, str]
"""A match: its kind, and the matching words of the text (or the empty string)."""


@dataclass(frozen=True, kw_only=True)
class ContentCheck(Check):
    """A check on each answer of the assistant. Its fact is the first fault found in the conversation."""

    find: Callable[[Exchange], Match | None]
    words: tuple[str, ...] = ()
    """`find` is applied to responses that contain one of these, in lower case,"""
    pretest: Callable[[Texts], Iterable[int]] = lambda _: ()
    """and to the exchanges with these indices."""
    action: Action = "warn"
    column: Callable[[Rows, str], Values] = lambda rows, name: rows.shared(_content_facts)[name]
    quotes: bool = True
    note: Callable[[DataSet, Sequence[Any]], list[str]] = kinds


def _content_facts(rows: Rows) -> dict[str, list[str | None]]:
    return content_facts(rows.records)


def content_facts(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Check -> for each record the fault in its first answer with one ("HTML tag: '...<br>...'", masked), else null.

    Args:
        records: canonical records or pairs; benchmark questions (those with `labelled`) have no answers to check.
    """
    texts = _texts(records)
    facts: dict[str, list[str | None]] = {check.name: [None] * len(records) for check in CONTENT_CHECKS}
    if not texts.said:
        return facts
    lower = texts.said_column.str.to_lowercase()
    worded = _contains_any(lower, [word for check in CONTENT_CHECKS for word in check.words]).arg_true()
    responses = lower.gather(worded)
    for check in CONTENT_CHECKS:
        column = facts[check.name]
        with_words = worded.filter(_contains_any(responses, check.words)).to_list() if check.words else []
        for i in sorted({*with_words, *check.pretest(texts)}):
            row = texts.rows[i]
            if column[row] is None and (found := check.find(one := texts.exchange(i, records))):
                column[row] = _excerpt(one, *found)
    return facts


def _texts(records: Sequence[Mapping[str, Any]]) -> Texts:
    texts = Texts([], [], [], [])
    rows, places, prompts, responses = texts.rows.append, texts.places.append, texts.asked.append, texts.said.append
    for row, record in enumerate(records):
        if "labelled" in record:
            continue
        start, asked = record.get("asked", 0), ""
        for at, message in enumerate(record["messages"]):
            role, content = message["role"], message["content"]
            if role == "assistant" and at >= start and message.get("weight") != 0:
                rows(row)
                places(at)
                prompts(asked)
                responses(content)
            asked = content if role == "user" else ""
    return texts


def _excerpt(one: Exchange, kind: str, phrase: str) -> str:
    """The kind, and the masked text around the phrase unless something in the phrase itself is masked."""
    for text in (one.said, one.asked) if phrase else ():
        if phrase in text and (at := (shown := _masked(text)).find(phrase)) >= 0:
            start, end = max(0, at - AROUND), at + len(phrase) + AROUND
            excerpt = visible(" ".join(shown[start:end].split()))
            return f"{kind}: '{'…' if start else ''}{excerpt}{'…' if end < len(shown) else ''}'"
    return kind


@lru_cache(maxsize=1)
def _masked(text: str) -> str:
    """A text with several faults is masked once."""
    return mask(text)


def _contains_any(lower: pl.Series, words: Iterable[str]) -> pl.Series:
    """Which of the lower-case texts contain one of the words."""
    return lower.str.contains("|".join(map(re.escape, words)))


_FENCE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.DOTALL)


def _prose(text: str) -> str:
    """The text without code in fences and backticks."""
    return _FENCE.sub(" ", text) if "`" in text or "~~~" in text else text


def _is_quoted(text: str, at: int) -> bool:
    """Whether the place is inside quotation marks."""
    before = text[:at]
    if before.count('"') % 2:
        return True
    return before.count("“") > before.count("”") or before.count("「") > before.count("」")


def _holds(text: str, phrase: str) -> bool:
    return phrase.strip().casefold() in text.casefold()


# --- refusals

REFUSES_WITHIN = 400
"""Characters at the beginning of an answer that are searched for a refusal."""
_NOT_ABLE = "unable|not able|not (?:allowed|permitted|designed|programmed|capable)"
_CANNOT = (
    rf"(?:can(?:no|['’])?t|can not|won['’]?t|will not|(?:am|['’]m) (?:{_NOT_ABLE})"
    r"|do(?:n['’]t| not) (?:currently |actually |really |yet )?(?:have (?:the |any )?(?:ability|abilities"
    r"|capabilit(?:y|ies)|access|means|tools?|function(?:ality)?|real-?time)|feel comfortable))"
)
_OPENS = (
    r"(?:I['’]m|I am|we['’]re|we are) (?:(?:so|very|really|truly|terribly) )?(?:sorry|afraid)"
    r"|(?:my )?(?:sincere )?apologies|(?:I|we) (?:sincerely |do |must )?apologi[sz]e(?: for [^.,\n]{1,60})?"
    r"|(?:so )?sorry|unfortunately|regrettably"
)
_SERVES = (
    r"(?:help|assist|provide|comply|fulfil|answer|support|engage|create|write|generat|discuss|do (?:that|this|so)"
    r"|share|offer|participat|condon|continue|complete|perform|access|browse|open|view|recommend|promot|encourag"
    r"|respond|produc|give you|tell you|process|execute|search|predict|display|retriev)"
)
_FLATLY = r"(?:I|we)(?: also| really| just| simply| still| currently| personally)? ?"
_REFUSALS = (
    re.compile(
        rf"\b(?:{_OPENS})[,.;:!]?(?: but| however| that)?,? (?:[^.!?\n]{{0,80}}?, (?:but )?)?"
        rf"{_FLATLY}{_CANNOT}(?: to)? ?(?P<what>{_SERVES})?",
        re.IGNORECASE,
    ),
    re.compile(rf"\A\W*{_FLATLY}{_CANNOT}(?: to)? (?P<what>{_SERVES})", re.IGNORECASE),
    re.compile(
        r"\bAs an? (?:[A-Za-z-]+ ){0,3}(?P<what>AI|artificial intelligence|language model|assistant|chatbot)\b"
        rf"[^.!?\n]{{0,80}}?\b{_FLATLY}{_CANNOT}"
        r"|\bI (?:must|have to|will have to|need to) (?:respectfully |politely )?(?:decline|refuse)"
        r" (?P<what2>to|this|that|your)\b"
        rf"|\bI(?:['’]m| am)? ?{_CANNOT} (?:to )?(?P<what3>assist|help you|help) with (?:that|this|your|such|any|the)\b"
        r"|\A\W*(?:It|That|This) (?:is|would be)"
        r" (?:not (?:appropriate|ethical|possible)|inappropriate|unethical|impossible)"
        r" (?:for me )?to (?P<what4>provide|create|generate|write|answer|assist|help|determine|fulfil)"
        r"|\b(?:against|violates?|outside)"
        r" (?P<what5>my (?:programming|guidelines|polic(?:y|ies)|principles|ethical|capabilit))",
        re.IGNORECASE,
    ),
    re.compile(
        r"\A\W*(?P<what>Es tut mir (?:sehr )?leid,? (?:aber )?(?:ich kann|(?:das|dabei) kann ich|als KI)"
        r"|Lo siento,? (?:pero )?(?:no puedo|como)|(?:Je suis )?désolée?,? (?:mais )?je ne (?:peux|suis)"
        r"|Mi dispiace,? (?:ma )?non posso|(?:Desculpe|Sinto muito|Lamento),? (?:mas )?(?:eu )?não posso"
        r"|(?:К сожалению|Извините),? (?:но )?я не могу|Helaas kan ik|Het spijt me,? (?:maar )?ik kan"
        r"|(?:很?抱歉|对不起|對不起)[,，。]?\s*(?:但)?(?:作为[^,，]{0,20}[,，])?\s*我(?:无法|不能|不會|不会|無法)"
        r"|申し訳(?:ありませんが|ございませんが)|すみませんが)",
        re.IGNORECASE,
    ),
)
"""Group `what` (with or without a digit at the end of its name) matches only if the assistant itself refuses to
answer."""
_SALUTATION = re.compile(r"\A\W*(?:Dear|Subject:|Hi|Hello|To whom)\b[^\n]*\n", re.IGNORECASE)
_WRITTEN_FOR_OTHERS = re.compile(
    r"\b(?:excuses?|letters?|e-?mails?|apolog\w+|messages?|repl(?:y|ies)|dialog\w*|conversations?|scripts?|stor(?:y"
    r"|ies)|poems?|speech|note|rewrite|paraphrase|rephrase|sentence|respond to|role|customer|tweet|act as|pretend)\b",
    re.IGNORECASE,
)


def _refusal(one: Exchange) -> Match | None:
    if _SALUTATION.match(one.said):
        return None
    head = " ".join(one.said[:REFUSES_WITHIN].split(" "))
    for pattern in _REFUSALS:
        match = pattern.search(head)
        if match is None or _is_quoted(head, match.start()) or _holds(one.before, " ".join(match.group().split()[-3:])):
            continue
        if any(match.groupdict().values()) or not first_match(_WRITTEN_FOR_OTHERS, one.asked):
            return "refusal", match.group().strip()
    return None


# --- boilerplate and identity

_MACHINE = (
    r"(?:AI(?:[- ](?:language model|assistant|model|chatbot|system|program|bot))?|artificial intelligence"
    r"|(?:large )?language model|LLM"
)
_BOILERPLATE = re.compile(
    rf"\bAs (?:an? )?(?:[A-Za-z-]+ ){{0,3}}?{_MACHINE}|chatbot|virtual assistant)"
    r"(?=[,.;]| (?:I|developed|created|trained|designed|made|my)\b)"
    rf"|\bI(?:['’]m| am) (?:just |only |merely |simply |actually )?an? (?:[A-Za-z-]+ ){{0,2}}?{_MACHINE})\b"
    r"(?! (?:engineer|researcher|expert|student|scientist|enthusiast|developer|consultant|specialist|startup|company))"
    r"|\bmy (?:knowledge|training)(?: data)? (?:cut-?off|only goes|ends|extends|is limited to)"
    r"|\b(?:as of|since|until|up to) my (?:last|latest|most recent)"
    r" (?:knowledge |training )?(?:update|training|cut-?off)|\bmy knowledge cut-?off\b"
    r"|\bI do(?:n['’]t| not) have (?:any )?"
    r"(?:personal (?:opinions?|feelings?|beliefs?|experiences?|preferences?|emotions?|views?)"
    r"|real-?time (?:data|information|access))"
    r"|作为(?:一个|一名)?(?:AI|人工智能)(?:语言)?(?:模型|助手)|\bals KI(?:-Sprachmodell|-Assistent)?,"
    r"|\bcomo (?:una? )?(?:IA|inteligencia artificial|modelo de lenguaje),"
    r"|\ben tant qu['’](?:IA|intelligence artificielle|assistant virtuel)",
    re.IGNORECASE,
)
_ASKS_WHO = re.compile(
    r"\b(?:who|what) (?:are|r|is|made|created|built|trained) (?:you|u)\b|\bare you (?:an?|the|really|human|chat)"
    r"|\byour (?:name|creators?|developers?|knowledge|training|cut-?off)\b"
    r"|\byou(?:'re| are) (?:just )?an? (?:AI|bot|robot|machine|language model)"
    r"|\b(?:introduce|about|describe) yourself",
    re.IGNORECASE,
)


def _boilerplate(one: Exchange) -> Match | None:
    match = first_match(_BOILERPLATE, _prose(one.said))
    if match is None or _is_quoted(one.said, one.said.find(match.group())):
        return None
    if _holds(one.before, match.group()) or first_match(_ASKS_WHO, one.asked):
        return None
    return "speaks as an AI", match.group().strip()


_MODELS = (
    r"Chat ?GPT|GPT-?[345]\w*|Bing Chat|Qwen\w*|Tongyi Qianwen|DeepSeek\w*|Open ?Assistant|ERNIE Bot|HuggingChat"
    r"|InternLM|ChatGLM\w*|Baichuan\w*|Google Bard|Google Gemini|Microsoft Copilot|Meta AI|StableLM|WizardLM"
)
_ALSO_WORDS = (
    r"Claude|Bard|Gemini|Llama\w*|LLaMA\w*|Grok|Copilot|Kimi|Mistral|Phi|Gemma|Sydney|Alpaca|Vicuna|Cohere|Command R"
    r"|Falcon|Dolly|Koala|Doubao"
)
"""Models whose names are also words or names of people: they count only if the text identifies them as a model."""
_MAKERS = (
    r"Open ?AI|Anthropic|Google(?: DeepMind| AI)?|DeepMind|Alibaba(?: Cloud)?|Meta(?: AI)?|Microsoft|Mistral(?: AI)?"
    r"|DeepSeek|Baidu|Moonshot(?: AI)?|xAI|Cohere|LAION|Hugging ?Face|Stability AI|Databricks|Zhipu(?: AI)?|Tencent"
    r"|ByteDance|LMSYS|Inflection(?: AI)?"
)
_MADE = r"(?:created|developed|trained|made|built|designed|programmed|powered|provided|fine-?tuned|produced|maintained)"
_CALLED = r"(?:I(?:['’]m| am)(?: called| named)?|(?i:my name is|call me|this is|you can call me))"
_IDENTITY = re.compile(
    rf"\b{_CALLED} (?:{_MODELS})\b(?! (?:engineer|user|expert|developer))"
    rf"|\b{_CALLED} (?:{_ALSO_WORDS})(?: \d[\d.]*)?,? (?:and I(?:['’]m| am) )?(?:an?|the|your)? ?"
    r"(?:(?:[A-Za-z-]+ ){0,4}"
    r"(?:AI\b|artificial intelligence|language model|LLM|chatbot|assistant|model (?:by|from))"
    rf"|{_MADE} by (?:{_MAKERS})\b)"
    rf"|\bI(?:['’]m| am| was| have been|['’]ve been)\b[^.!?\n]{{0,80}}?\b{_MADE} by (?:the )?"
    rf"(?:(?:team|people|researchers|engineers|company) )?(?:(?:at|of|from) )?(?:{_MAKERS})\b"
    rf"|\b(?:{_MAKERS}) (?:has |have )?{_MADE} me\b"
    rf"|\b(?i:my (?:creators?|developers?|makers?)(?: is| are|,)?(?: at)?) (?:{_MAKERS})\b"
    rf"|\b(?i:as) (?:{_MODELS}),? I\b"
    r"|\b(?i:as an?) (?:[A-Za-z-]+ ){0,3}(?:AI|model|assistant)(?: (?:language )?(?:model|assistant))?,? "
    rf"(?:{_MADE} )?(?:by|from) (?:{_MAKERS})\b"
    rf"|\bI(?:['’]m| am) (?:an?|the|one of) (?:{_MAKERS})(?:['’]s)? (?:[A-Za-z-]+ ){{0,3}}"
    r"(?:model|assistant|AI|chatbot)"
    r"|我(?:是|叫)(?:一个)?(?:由)?\s*"
    r"(?:ChatGPT|GPT|OpenAI|Claude|Anthropic|通义千问|千问|Qwen|文心一言|百度|阿里|DeepSeek|深度求索|Kimi|智谱|豆包)"
    rf"|\b(?i:ich bin|je suis|yo soy|soy|sono|eu sou|sou|ik ben) (?:{_MODELS})\b"
)
_FIRST_PERSON = re.compile(r"\b(?:I|me|my|as|as an?|this is|ich bin|je suis|soy|sou|sono|ben)\b|我", re.IGNORECASE)
_NAMED = re.compile(rf"{_MODELS}|{_ALSO_WORDS}|{_MAKERS}")
_PLAYS = r"(?i)\b(?:you(?: are|['’]re|r name is)|act as|pretend|imagine|role|persona|play)\b[^\n]{0,60}\b"


def _identity(one: Exchange) -> Match | None:
    match = first_match(_IDENTITY, _prose(one.said)) if first_match(_FIRST_PERSON, one.said) else None
    if match is None or _is_quoted(one.said, one.said.find(match.group())):
        return None
    named = _NAMED.search(match.group())
    if named and re.search(rf"{_PLAYS}{re.escape(named.group())}\b", one.before):
        return None
    return "identity", match.group().strip()


# --- placeholders

_EMPTY_ANSWERS = frozenset(
    {
        "n/a", "#n/a", "nan", "null", "nil", "undefined", "todo", "to do", "tbd", "tba", "fixme", "placeholder",
        "lorem ipsum", "no output", "nooutput", "no response", "no answer", "not available", "not applicable", "xxx",
        "...", "…", "-", "--", "?", "#name?", "#ref!", "answer here", "your answer here", "insert answer here",
        "to be determined", "to be done", "coming soon",
    }
)  # fmt: skip
_WRAPPING = " \n\t\"'<>[](){}*`.!"
_PERSONS = (
    r"your|recipient|sender|customer|client|company|employer|hiring manager|friend|name of|date of|teacher|professor"
    r"|manager|boss"
)
_THINGS = (
    r"(?:first |last |full )?name|date|time|address|location|city|phone number|e-?mail address|signature|title"
    r"|position|job title|topic|number|amount|link|url|x{2,}"
)
_INSERT = re.compile(r"[\[<{]insert\b[^\]>}\n]{0,60}[\]>}]|\blorem ipsum\b", re.IGNORECASE)
_SLOT = re.compile(
    r"[\[<{](?:please )?(?:insert|fill in|enter|add|put|type)\b[^\]>}\n]{0,60}[\]>}]|\(insert\b[^)\n]{0,60}\)"
    rf"|[\[<{{](?:{_PERSONS})(?:['’]s)?\b[ _-]?[^\]>}}\n]{{0,40}}[\]>}}]|\[(?:{_THINGS})\](?!\()"
    r"|\{\{ ?[a-z_]+ ?\}\}|\blorem ipsum\b",
    re.IGNORECASE,
)
_IN_ANY_BRACKET = (*_PERSONS.split("|"), "please", "insert", "fill in", "enter", "add", "put", "type")
_IN_BRACKETS = (
    "first last full name date time address location city phone email e-mail signature title position job topic number"
    " amount link url xx"
)
_SLOT_WORDS = (
    *(f"{bracket}{word}" for bracket in "[<{" for word in _IN_ANY_BRACKET),
    *("(insert", "{{", "lorem ipsum"),
    *(f"[{word}" for word in _IN_BRACKETS.split()),
)
_WANTS_SLOTS = re.compile(
    r"template|placeholder|boilerplate|fill[- ]in|\bblanks?\b|lorem|variable|\bform\b|\bmad libs?\b|regex|format",
    re.IGNORECASE,
)


def _is_only_placeholder(text: str) -> bool:
    if len(text) >= 40:
        return False
    bare = text.strip().casefold()
    return bare in _EMPTY_ANSWERS or bare.strip(_WRAPPING) in _EMPTY_ANSWERS


def _placeholder_pretest(texts: Texts) -> Iterable[int]:
    short = (texts.said_column.str.len_bytes() < 40).arg_true().to_list()
    empty = [i for i in short if _is_only_placeholder(texts.said[i])]
    slots = _contains_any(texts.asked_lower, ["[insert", "<insert", "{insert", "lorem ipsum"])
    return [*empty, *slots.arg_true().to_list()]


def _placeholder(one: Exchange) -> Match | None:
    if _is_only_placeholder(one.said):
        return "nothing but a placeholder", one.said.strip()
    before = one.before
    if first_match(_WANTS_SLOTS, before):
        return None
    if (match := first_match(_SLOT, _prose(one.said))) and not _holds(before, match.group()):
        return "slot in the response", match.group()
    if match := first_match(_INSERT, _prose(one.asked)):
        return "slot in the prompt", match.group()
    return None


# --- echo

ECHO = 16
"""Minimum number of characters of a prompt whose copy counts. It also needs three words; half of the characters suffice
if they are of `WITHOUT_SPACES`."""
_UNSPACED = re.compile(f"[{WITHOUT_SPACES}]")
_LABEL = r"(?:the )?(?:question|prompt|instruction|task|query|q|user|human|input|request)s?\W*(?:is|was|:|\n)"
_LABELLED = re.compile(rf"\A\W*(?:{_LABEL}\W*)?", re.IGNORECASE)
_WANTS_ECHO = re.compile(r"\b(?:repeat|echo|copy|recite|verbatim)\b|重复|重複|复述|照抄|繰り返", re.IGNORECASE)
_WANTS_EDIT = re.compile(
    r"\b(?:rewrite|edit|correct|proofread|translate|continue|complete|finish|fix|paraphrase|improve|format|reformat"
    r"|rephrase|spell|extend|add)\b|改写|翻译|续写|继续|补全|润色|修改|纠正|校对|扩写|翻訳|書き直|添削|続き",
    re.IGNORECASE,
)
_AROUND_ECHO = " \n\t#*>\"'“”`"


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def _echo_pretest(texts: Texts) -> Iterable[int]:
    asked, said = (
        column.str.slice(0, 64).str.strip_chars_start(_AROUND_ECHO).str.replace_all(r"\s+", " ").str.to_lowercase()
        for column in (texts.asked_column, texts.said_column)
    )

    def same(size: int) -> pl.Series:
        return asked.str.slice(0, size) == said.str.slice(0, size)

    alike = same(ECHO - 2) | said.str.contains(rf"^{_LABEL}")
    alike |= same(ECHO // 2 - 2) & asked.str.contains(_UNSPACED.pattern)
    return (alike & (texts.asked_column.str.len_bytes() >= ECHO)).arg_true().to_list()


def _echo(one: Exchange) -> Match | None:
    asked, answer = _normalized(one.asked).strip(_AROUND_ECHO), _LABELLED.sub("", one.said, count=1)
    said = _normalized(answer).lstrip(_AROUND_ECHO)
    if not said.startswith(asked[:ECHO]) or first_match(_WANTS_ECHO, one.asked):
        return None
    for part in dict.fromkeys((asked, _normalized(one.asked.strip().partition("\n\n")[0]).strip(_AROUND_ECHO))):
        if (len(part) < ECHO or part.count(" ") < 2) and len(_UNSPACED.findall(part[: 10 * ECHO])) < ECHO // 2:
            continue
        if said.rstrip(_AROUND_ECHO + ".?!") == part.rstrip(".?!"):
            return "the response is the prompt", ""
        if not said.startswith(part):
            continue
        is_line = _normalized(answer.strip().partition("\n")[0]).strip(_AROUND_ECHO) == part
        is_whole = part == asked and (is_line or part[-1] in "?!.:。？！")
        if is_whole or (is_line and not first_match(_WANTS_EDIT, one.asked)):
            return "the response begins with the prompt", ""
    return None


# --- cut ends

PROSE, LONG = 8, 30
"""Minimum number of words of a line of prose, as opposed to a title or an item; and of a response that should end with
a period."""
_CLOSED = frozenset(".!?…。！？\"'”’」)]}>`*_|%$€£°~=\\0123456789")
"""Characters at which a text may end."""
_GOES_ON = (
    "the a an of and or but with from by into because if than their its your our my which such these his her is are"
    " was were has have had would could should will can may might must that to for in on at as while when where"
    " although however between without"
)
"""Words at which no sentence ends."""
_UNFINISHED = frozenset(_GOES_ON.split())
_BULLET = r"(?:[-*•+–]|\d{1,3}[.)])"
_EMPTY_ITEM = re.compile(rf"(?:\A|\n)[ \t]*(?:{_BULLET}|#{{1,6}})(?:[ \t]+\*{{1,2}})?\Z")
_ITEM = re.compile(rf"(?<![ \t])[ \t]*+(?:{_BULLET}|[a-zA-Z][.)]|#{{1,6}}|>|\|)\s*")
_STOP = re.compile(r"[.!?…。！？](?<!\d.)(?<!\b[A-Z].)(?<!\bMr.)(?<!\bDr.)(?<!\bMrs.)(?<!\bSt.)[\"'”’)\]*_]*(?:\s|\Z)")
"""Lookbehinds follow the mark: before it, they would be tried at every character."""
_CODE = (re.compile(r"[{}=\\;|<>]"), re.compile(r"\((?<=\w.)"), re.compile("://"))
_CODE_LINE = re.compile(r"\s{4,}\S|[^\S\n]*+(?:#|//|import |def |class |SELECT )")
_SIGNATURE = re.compile(
    r"\W*[-–—#@~(]|\W*(?:sincerely|regards|love|yours|cheers|best|thanks|thank you)\b", re.IGNORECASE
)


def _cut_pretest(texts: Texts) -> Iterable[int]:
    closed, found = _CLOSED, []
    for i, said in enumerate(texts.said):
        text = said.rstrip()
        end = text[-1:]
        is_item = end in closed and end in ".*)" and len(text[-80:].rpartition("\n")[2].strip()) < 8
        if is_item or end not in closed or "```" in text or (text[0] in "{[" and end not in "}]"):
            found.append(i)
    return found


def _find_cut_end(one: Exchange) -> Match | None:
    text = one.said.rstrip()
    # an answer with a tool call continues after the result
    if not one.asked or not text or any(map(calls, one.messages[one.at : one.at + 1])):
        return None
    tail = text[-40:]
    if text.count("```") % 2:
        return "open code fence", tail
    if text[-1] not in "}]" and re.match(r'(?:\{\s*"|\[\s*[{\["])', text):
        return "open JSON", tail
    prose = _prose(text).rstrip()
    is_long = _has_words(prose, 5) or len(_UNSPACED.findall(prose[-10 * PROSE :])) >= 2 * PROSE
    if prose[-1:] != text[-1] or not is_long:
        return None
    if _EMPTY_ITEM.search(prose):
        return "empty list item", tail
    last = prose.rpartition("\n")[2]
    if _is_code(last):
        return None
    if prose[-1] in ",(，、（":
        return ("open bracket" if prose[-1] in "(（" else "ends with a comma"), tail
    if prose[-1] == ":" and _STOP.search(prose):
        return "ends with a colon", tail
    word = _WORDS.match(prose.rsplit(None, 1)[-1][::-1])  # from its end: a search for it would begin at every letter
    return ("ends in mid-sentence", tail) if word and _is_mid_sentence(prose, last, word.group()[::-1]) else None


def _is_mid_sentence(prose: str, last: str, word: str) -> bool:
    """Whether a text that ends in a letter is cut off.

    Args:
        last: its last line.
        word: its last word.
    """
    if not _STOP.search(prose):
        return False
    if word in _UNFINISHED and _has_words(last, 3):
        return True
    if not _has_words(prose, LONG):
        return False
    sentences = _STOP.split(_ITEM.sub("", last, count=1))
    if len(sentences) > 1:
        return not _SIGNATURE.match(sentences[-1])
    if not _has_words(last, PROSE - 2):
        return False
    lines = [line.rstrip() for line in prose.split("\n")[:-1] if _has_words(line, PROSE)]
    return len(lines) >= 2 and all(line[-1] in _CLOSED or line[-1] == ":" for line in lines)


def _has_words(text: str, least: int) -> bool:
    return len(text.split(None, least - 1)) >= least


def _is_code(line: str) -> bool:
    return bool(any(pattern.search(line) for pattern in _CODE) or _CODE_LINE.match(line))


# --- loops

LOOPS = 4
"""Minimum number of repetitions of a line, a sentence or a run of words in a loop."""
PROBE = 18
"""Length of the probes that locate possible loops, in characters; a third of it in scripts in which a character can be
a word."""
LOOKED_THROUGH = 20_000
"""Characters of a response that are searched for loops."""
_ONE_CHARACTER = re.compile(r"(\w)\1{29}")
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")
_SENTENCE = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]*_]*+\s+|\n+|[。！？]")
_COUNTER = re.compile(r"\A\W*(?:\d+\W+)?")
_RUNS = (
    re.compile(r"(?<!\S)((?!\d+ )\S\S+ )\1{6}"),
    re.compile(r"(?<!\S)((?:\S+ ){2,3})\1{4}"),
    re.compile(r"(?<!\S)((?:\S+ ){4,30}?)\1{3}"),
)
_WANTS_LOOPS = re.compile(
    r"\b(?:repeat\w*|times|loop\w*|patterns?|lyrics?|songs?|chorus|refrain|chant|sequence|poems?|rhymes?|palindrome"
    r"|binary|ascii|rap|mantra)\b",
    re.IGNORECASE,
)


def _loop_pretest(texts: Texts) -> Iterable[int]:
    found = []
    for i, text in enumerate(texts.said):
        size, probe = len(text), PROBE if text.isascii() else PROBE // 3
        if size < probe * LOOPS:
            if size > 12 and len(set(text)) * 3 < size:
                found.append(i)
            continue
        half, quarter = size >> 1, size >> 2
        for at in (size - probe, half, half + quarter):
            if text.count(text[at : at + probe]) >= LOOPS:
                found.append(i)
                break
    return found


def _loop(one: Exchange) -> Match | None:
    if match := _ONE_CHARACTER.search(one.said):
        return "one character over and over", match.group()
    text = _prose(one.said[:LOOKED_THROUGH])
    tokens = _TOKEN.findall(text.casefold())
    if _most_repeated(tokens, 3) < LOOPS or first_match(_WANTS_LOOPS, one.asked):
        return None
    units = Counter(_COUNTER.sub("", unit).strip() for unit in _SENTENCE.split(text))
    again = {unit: times * len(unit) for unit, times in units.items() if times >= LOOPS and _is_sentence(unit)}
    if again and 3 * sum(again.values()) >= len(text):
        return "sentences or lines over and over", max(again, key=lambda unit: again[unit])
    words = "".join([f"{token} " for token in tokens]) if _most_repeated(tokens, 4) >= LOOPS else ""
    for pattern in _RUNS:
        if (match := pattern.search(words)) and not match[1].replace(" ", "").isdigit():
            return "one run of words over and over", ""
    return None


def _most_repeated(tokens: Sequence[str], size: int) -> int:
    """How often the most frequent run of tokens occurs."""
    runs = Counter(zip(*(tokens[start:] for start in range(size)), strict=False))
    return max(runs.values(), default=0)


def _is_sentence(text: str) -> bool:
    return (_has_words(text, 3) or len(_TOKEN.findall(text)) >= 6) and not _is_code(text)


# --- markup

_TAG = re.compile(
    r"</?(?:div|span|p|br|li|ul|ol|table|tr|td|th|font|center|img|h[1-6]|strong|em|blockquote|iframe|section"
    r"|a)(?:\s+[a-z-]+ ?= ?[\"'][^<>]*)?\s*/?>|<!--.*?-->",
    re.IGNORECASE | re.DOTALL,
)
_ENTITY = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|[rl][sd]quo|[mn]dash|hellip|bull|copy|reg|trade|euro|#\d{2,5}|#x[0-9a-f]{2,5});",
    re.IGNORECASE,
)
_TAG_NAMES = (
    "div span p> br li ul ol table tr td th font center img h1 h2 h3 h4 h5 h6 strong em blockquote iframe section !--"
)
_ENTITY_NAMES = "nbsp amp lt gt quot apos rsquo lsquo rdquo ldquo mdash ndash hellip bull copy reg trade euro"
_ROLE_NAMES = "human user assistant chatgpt gpt ai bot"
_MARKUP_WORDS = (
    *(f"<{tag}" for tag in (*_TAG_NAMES.split(), "a ", "p ", "/")),
    *(f"&{name};" for name in _ENTITY_NAMES.split()),
    "&#",
    *(f"{role}{colon}" for role in _ROLE_NAMES.split() for colon in (":", "**:", ":**")),
)
_ROLES = r"(?:Human|User|HUMAN|USER)"
_OWN_ROLES = r"(?:Assistant|ASSISTANT|ChatGPT|GPT|AI|Bot)"
_ROLE_IN_RESPONSE = re.compile(rf"(?:\A|\n)[ \t>*#]*(?:{_ROLES}|{_OWN_ROLES})(?:\*\*)?:")
_ROLE_IN_PROMPT = re.compile(rf"\A[ \t>*#]*{_ROLES}(?:\*\*)?:|\n[ \t>*#]*{_OWN_ROLES}(?:\*\*)?:\s*\Z")
_ABOUT_MARKUP = re.compile(
    r"html|\bcss\b|xml\b|javascript|\bjsx?\b|\btags?\b|web ?(?:page|site|app)|markup|markdown|\breact\b|\bsvg\b"
    r"|\bphp\b|\bentit|escape|\bvue\b|angular|\bdom\b|\bcode\b|\bregex|pars(?:e|ing)|scrap(?:e|ing)|beautifulsoup",
    re.IGNORECASE,
)
_WANTS_TALK = re.compile(
    r"dialog|conversation|\bchat|transcript|interview|\bscript\b|role|\bskit\b|\bplay\b|discussion|scene|exchange"
    r"|\bbot\b|debate|human\b|\buser\b|assistant",
    re.IGNORECASE,
)
_MENTIONS_TALK = re.compile(r"dialog|conversation|transcript|interview|\bscript\b", re.IGNORECASE)
_DOCUMENT = re.compile(r"\s*<(?:!doctype|html|\?xml|svg|[a-z]+[ >])", re.IGNORECASE)


def _without_open_comments(text: str) -> str:
    """The text without the marks of comments that are not closed.

    From each of them, a search for its end would go through the whole text.
    """
    end = text.rfind("-->") + 1
    return text[:end] + text[end:].replace("<!--", "<!  ")


def _markup_pretest(texts: Texts) -> Iterable[int]:
    return _contains_any(texts.asked_lower, _MARKUP_WORDS).arg_true().to_list()


def _markup(one: Exchange) -> Match | None:
    said, asked, before = map(_without_open_comments, (_prose(one.said), _prose(one.asked), one.before))
    if (match := first_match(_ROLE_IN_RESPONSE, said)) and not first_match(_WANTS_TALK, before):
        return "role label", match.group().strip()
    if (match := first_match(_ROLE_IN_PROMPT, asked)) and not first_match(_MENTIONS_TALK, asked):
        return "role label", match.group().strip()
    if _DOCUMENT.match(said) and said.rstrip().endswith(">") and _is_about_markup(before):
        return None
    for text in (said, asked):
        for kind, pattern in (("HTML tag", _TAG), ("HTML entity", _ENTITY)):
            match = first_match(pattern, text)
            if match and not any(_is_about_markup(without_matches(pattern, words)) for words in {before, text}):
                return kind, match.group()
    return None


def _is_about_markup(text: str) -> bool:
    return first_match(_ABOUT_MARKUP, text) is not None


# --- language

LETTERS, SCRIPT_LETTERS = 25, 10
"""Minimum number of letters to identify a text's language; the second one applies if prompt and response differ in
script and one is Chinese, Japanese or Korean."""
READ = 300
"""Characters at the beginning of a text from which its language is identified."""
SURE, LIKELY, UNLIKELY = 0.8, 0.5, 0.05
"""Minimum probability of a response's language, of a prompt's language, and maximum probability of the other text's
language in each."""
_FREQUENT_WORDS = {
    "en": (
        "the of and to that are you for with what how this it he she his they there has have"
        " from each can will not would their but if when which more than i is a in"
    ),
    "de": "der die das und ist nicht ein eine mit für von zu auf den wie ich sie im in werden sind",
    "fr": "le la les et est des une un du pour que qui dans avec vous je pas au ce sont",
    "es": "el la los las y es de que en un una por con para como del se su son",
    "pt": "o os as e é de que em um uma por com para como do da não se são",
    "it": "il lo gli e è di che un una per con come non del della sono si la",
    "nl": "de het een en is van dat niet met voor op zijn wat hoe ik te in",
    "ru": "и в не на что с как это по для я из от но к",
}
_FREQUENT = {code: frozenset(words.split()) for code, words in _FREQUENT_WORDS.items()}
"""ISO 639 code -> frequent short words. If those of one language are the most frequent on both sides, the pair is not
examined further."""
_ONLY_ENGLISH = frozenset(
    word for word in _FREQUENT["en"] if len(word) > 2 and word not in {"for", "can", "will", "not", "has", "are"}
)
"""Those that show that a text is English; "in", "is" and "of" are words of other languages, too."""
_NOT_LETTERS = re.compile(r"[\W\d_]+")
_WORDS = re.compile(r"[^\W\d_]+")
_QUOTES = re.compile(r"[\n:\"“”«»]+")
_NAMES_A_LANGUAGE = re.compile(
    r"translat|translit|\b(?:foreign |other |which |what |another |native )?languages?\b|multilingual|bilingual"
    r"|\b(?:english|spanish|french|german|italian|portuguese|dutch|russian|chinese|mandarin|cantonese|japanese|korean"
    r"|arabic|hindi|turkish|polish|swedish|danish|norwegian|finnish|greek|hebrew|latin|vietnamese|thai|indonesian"
    r"|ukrainian|czech|hungarian|romanian|persian|farsi|urdu|bengali|tamil|catalan|esperanto|swahili|malay|tagalog"
    r"|pinyin|kanji|hiragana|bulgarian|croatian|serbian|slovak|irish|welsh|basque|galician)\b|übersetz"
    r"|auf (?:deutsch|englisch|französisch|spanisch)|traduc|traduz|traduis|traduire|inglés|español|francés|alemán"
    r"|anglais|français|espagnol|allemand|inglês|português|espanhol|inglese|italiano|vertaal|engels|перевед|перевод"
    r"|английск|по-русски|翻译|翻譯|英语|英文|中文|日语|法语|英語|日本語|訳|번역|영어|한국어",
    re.IGNORECASE,
)
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")
_SHARED_SCRIPTS = frozenset({"Latin", "Cyrillic", "Arabic", "Devanagari"})
"""Scripts in which many languages are written."""


def _language_pretest(texts: Texts) -> Iterable[int]:
    asked, said = texts.asked_column.str, texts.said_column.str
    is_long = (asked.len_bytes() >= SCRIPT_LETTERS) & (said.len_bytes() >= SCRIPT_LETTERS)
    words = "|".join(sorted(_ONLY_ENGLISH))
    twice = rf"(?i)[\s(\"](?:{words})[\s,.?](?s:.)*?[\s(\"](?:{words})[\s,.?]"
    is_english = asked.slice(0, READ).str.contains(twice) & said.slice(0, READ).str.contains(twice)
    return (is_long & ~is_english).arg_true().to_list()


def _language(one: Exchange) -> Match | None:
    if one.said[:1] in "{[":
        return None
    asked, said = (_prose(text).strip()[:READ] for text in (one.asked, one.said))
    letters = min(_count_letters(asked), answered := _count_letters(said))
    if letters < SCRIPT_LETTERS or 5 * answered < 3 * len("".join(said.split())):  # figures, formulas
        return None
    wrote = ["Latin", "Latin"] if asked.isascii() and said.isascii() else scripts([asked, said])
    if wrote[0] != wrote[1]:
        is_short = letters < LETTERS and not {"Han", "Kana", "Hangul"} & {*wrote}
        # names, addresses and titles in Japanese have few kana, or none
        both_have_kana = _KANA.search(asked) and _KANA.search(said)
        is_japanese = {*wrote} == {"Han", "Kana"} and (letters < LETTERS or both_have_kana)
        if is_short or is_japanese or any(name.startswith("(") for name in wrote):
            return None
        differ = f"{wrote[0]} asked, {wrote[1]} answered"
    elif wrote[0] in _SHARED_SCRIPTS and letters >= LETTERS and (languages := _languages(asked, said)):
        differ = f"{languages[0]} asked, {languages[1]} answered"
    else:
        return None
    return None if first_match(_NAMES_A_LANGUAGE, one.before) else (differ, said[:40])


def _languages(asked: str, said: str) -> tuple[str, str] | None:
    """The languages (ISO 639) of two texts in one script if they surely differ."""
    if (usual := _language_of_frequent_words(asked)) and usual == _language_of_frequent_words(said):
        return None
    language, probability = _identifier().classify(said)
    if language == "zxx" or probability < SURE:  # zxx: no language
        return None
    prompted, probability = _identifier().classify(asked)
    if prompted in {language, "zxx"} or probability < LIKELY:
        return None
    if _probability(asked, language) > UNLIKELY or _probability(said, prompted) > UNLIKELY:
        return None
    for part in _QUOTES.split(asked):  # a prompt may quote a text in another language
        if _language_of_frequent_words(part) == language:
            return None
        if _count_letters(part) >= SCRIPT_LETTERS and _probability(part, language) > UNLIKELY:
            return None
    return prompted, language


def _language_of_frequent_words(text: str) -> str | None:
    """The language with the most frequent words in the text; None if there are several."""
    words = {*_WORDS.findall(text.casefold())}
    counts = sorted(((len(words & frequent), code) for code, frequent in _FREQUENT.items()), reverse=True)
    (most, language), (second, _), *_ = counts
    return language if most > second else None


def _count_letters(text: str) -> int:
    return len(_NOT_LETTERS.sub("", text))


def _probability(text: str, language: str) -> float:
    """That a text is in a language, given by its ISO 639 code."""
    return dict(_identifier().rank(text)).get(language, 0)


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


CONTENT_CHECKS: tuple[ContentCheck, ...] = (
    ContentCheck(
        "refusal",
        "No response declines to answer.",
        "warn",
        "Keep intended refusals; answer the others, or remove them.",
        words=(
            "sorry", "afraid", "pologi", "unfortunately", "regrettably", "as an ai", "as a large", "as an artificial",
            "language model", "chatbot", "i decline", "to decline", "respectfully decline", "to refuse", "must refuse",
            "comfortable", "my programming", "my guidelines", "my polic", "my principles", "my ethical", "my capabilit",
            "inappropriate", "not appropriate", "ethical", "be impossible", "not possible", "is impossible",
            "help you with", "help with", "assist with", "cannot", "can't", "can’t", "can not", "cant ", "won't",
            "won’t", "wont ", "will not", "m unable", "m not ", "do not", "don't", "don’t", "leid", "lo siento",
            "désolé", "dispiace", "desculpe", "sinto muito", "lamento", "сожалению", "извините", "helaas",
            "het spijt", "抱歉", "对不起", "對不起", "申し訳", "すみません",
        ),
        find=_refusal,
    ),
    ContentCheck(
        "assistant_boilerplate",
        "No response refers to itself as an AI model without being asked.",
        "warn",
        "Remove the phrase, or rewrite the response: a model trained on it repeats it in other contexts.",
        words=(
            " ai", "language model", "artificial intelligence", "llm", "chatbot", "virtual assistant", "my knowledge",
            "my training", "my last", "my latest", "my most recent", "have personal", "have any personal", "have real",
            "have any real", "作为", "als ki", "como una ia", "como un ia", "como ia", "inteligencia artificial",
            "modelo de lenguaje", "en tant qu",
        ),
        find=_boilerplate,
    ),
    ContentCheck(
        "foreign_identity",
        "No response claims to be another vendor's model.",
        "warn",
        "Insert your own model's name, or remove the row.",
        words=(
            "chatgpt", "chat gpt", "gpt-", "gpt3", "gpt4", "openai", "open ai", "anthropic", "google", "deepmind",
            "alibaba", "meta", "microsoft", "mistral", "deepseek", "baidu", "moonshot", "xai", "cohere", "laion",
            "huggingface", "hugging face", "stability ai", "databricks", "zhipu", "tencent", "bytedance", "lmsys",
            "inflection", "bing chat", "qwen", "qianwen", "openassistant", "open assistant", "ernie bot", "huggingchat",
            "internlm", "chatglm", "baichuan", "stablelm", "wizardlm", "claude", "bard", "gemini", "llama", "grok",
            "copilot", "kimi", "phi", "gemma", "sydney", "alpaca", "vicuna", "command r", "falcon", "dolly", "koala",
            "doubao", "我是", "我叫",
        ),
        find=_identity,
    ),
    ContentCheck(
        "placeholder_text",
        "No text contains an unfilled placeholder.",
        "info",
        "Fill it in, or remove the row.",
        words=_SLOT_WORDS,
        pretest=_placeholder_pretest,
        find=_placeholder,
    ),
    ContentCheck(
        "prompt_echo",
        "No response repeats its prompt.",
        "warn",
        "Remove the copy of the prompt from the response.",
        pretest=_echo_pretest,
        find=_echo,
    ),
    ContentCheck(
        "truncated_response",
        "No response is cut off.",
        "info",
        "Complete the response, or remove the row; check the token limit used when the responses were generated.",
        pretest=_cut_pretest,
        find=_find_cut_end,
    ),
    ContentCheck(
        "repetition",
        "No response repeats the same text in a loop.",
        "warn",
        "Cut the response where the loop begins, or remove the row.",
        pretest=_loop_pretest,
        find=_loop,
    ),
    ContentCheck(
        "markup_leftovers",
        "No text contains HTML or role labels from the page or log that it was copied from.",
        "warn",
        "In the source, convert HTML to text and remove role labels.",
        words=_MARKUP_WORDS,
        pretest=_markup_pretest,
        find=_markup,
    ),
    ContentCheck(
        "language_mismatch",
        "Every response is in the language of its prompt.",
        "warn",
        "Translate the response, or state the requested language in the prompt.",
        pretest=_language_pretest,
        find=_language,
    ),
)  # fmt: skip
