"""Content checks: each finds varied bad answers and passes good ones that look similar."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from dagster_project.core.records import example_id
from dagster_project.curation.checks import content, text_search
from dagster_project.curation.checks.checks import CHECKS, Rules, judge
from dagster_project.curation.checks.content import CONTENT_CHECKS, content_facts
from dagster_project.curation.checks.findings import document
from dagster_project.curation.checks.row_checks import ROW_CHECKS

Record = dict[str, Any]
NAMES = [check.name for check in CONTENT_CHECKS]
REPORT = (
    "The harbor was dredged in 1931, and the town grew quickly after that. Ships from the north brought timber and"
    " coal. By the end of the decade there were four yards on the east side, and the school had"
)
LOOP = "We will look into this and come back to you. "


def chat(*turns: tuple[str, str]) -> Record:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"example_id": example_id(messages), "messages": messages, "category": None, "group_id": None, "meta": "{}"}


def ask(prompt: str, answer: str, *before: tuple[str, str]) -> Record:
    return chat(*before, ("user", prompt), ("assistant", answer))


Q = "How do I plant garlic in a small garden?"
POEM = "O wind of the west,\nO rain of the sea,\nO light on the hill,\nCome back to me"
CSV = "name,age\nAnn,31\nBob,44\nCid,27"
BAD: dict[str, list[Record]] = {
    "refusal": [
        ask("Tell me how to pick a lock.", "I'm sorry, but I can't help with that."),
        ask("Write a poem about my boss.", "I apologize, but I cannot write content that mocks a person."),
        ask("What is the weather today?", "Unfortunately, I do not have access to real-time weather data."),
        ask("Book a table for two.", "As an AI language model, I am unable to make reservations."),
        ask("Give me medical advice.", "I must respectfully decline to answer this."),
        ask("Describe the photo.", "I cannot provide a description of an image that I can't see."),
        ask("Schreibe ein Gedicht über Macht.", "Es tut mir leid, aber ich kann dabei nicht helfen."),
        ask("写一首诗", "很抱歉，我无法提供这方面的内容。"),
        ask("Is this mole dangerous?", "We cannot provide medical advice."),
        ask("Who lives next door?", "I simply can't answer that."),
        ask("Open the gate.", "I cant do that."),
    ],
    "assistant_boilerplate": [
        ask("Which color is best?", "As an AI language model, I think that blue is a good choice."),
        ask("How was your day?", "As an AI, I do not feel, but thank you."),
        ask("Recommend a novel.", "I'm just an AI assistant, but many readers like Middlemarch."),
        ask("Who won the election?", "As of my last update in 2021, the votes were still being counted."),
        ask("Do you like jazz?", "I don't have personal opinions, yet jazz is loved by many."),
        ask("Cats or dogs?", "I am a large language model and both are fine."),
        ask("你喜欢什么颜色", "作为一个人工智能语言模型，我没有偏好，不过蓝色很受欢迎。"),
        ask("Do you like trains?", "I'm a friendly AI and I like them."),
        ask("¿Te gusta el tren?", "Como un IA, no viajo, pero es cómodo."),
    ],
    "foreign_identity": [
        ask("Who are you?", "I am ChatGPT, here to help."),
        ask("Who made you?", "I was created by OpenAI."),
        ask("What is your name?", "My name is Claude, an AI assistant made by Anthropic."),
        ask("Hello!", "Hello! I'm Qwen, a model from Alibaba Cloud."),
        ask("Introduce yourself.", "I am Bard, a large language model. Ask me anything."),
        ask("Are you free?", "I'm a language model trained by Google, so yes."),
        ask("你是谁", "我是通义千问，很高兴认识你。"),
    ],
    "placeholder_text": [
        ask(Q, "N/A"),
        ask(Q, "nan"),
        ask(Q, "TODO"),
        ask(Q, "[Insert answer here]"),
        ask("Write a letter to the council.", "Dear council,\nplease mend the road.\nYours, [Your Name]"),
        ask("Write about our firm.", "Lorem ipsum dolor sit amet, consectetur."),
        ask("Write a greeting.", "Hello <your name>, welcome back."),
        ask("Write an essay on [insert topic].", "Trees clean the air and hold the soil."),
        ask("Say hello to the client.", "Hello {{ first_name }}, how are you?"),
    ],
    "prompt_echo": [
        ask(Q, Q),
        ask(Q, f"{Q} Plant the cloves in autumn."),
        ask(Q, f"Question: {Q}\nAnswer: In autumn."),
        ask(Q, f"**{Q}**\n\nIn autumn, two inches deep."),
        ask("Name three rivers in France.", "name three rivers in  France"),
        ask("Sort the list by length.\n\npear, fig, banana", "Sort the list by length.\n\nfig, pear, banana"),
        ask("Describe the water cycle", "Describe the water cycle\nWater evaporates and falls as rain."),
        ask("请解释一下什么是光合作用。", "请解释一下什么是光合作用。光合作用把光能变成化学能。"),
        ask("光合作用を簡単に説明して", "光合作用を簡単に説明して"),
        ask("Which town  lies at the mouth of the river?", "Which town lies at the mouth of the river? Rye."),
        ask("Which town lies on the river?", "The question is: Which town lies on the river?\nLewes."),
    ],
    "truncated_response": [
        ask("介绍一下这座城市。", "这座城市位于河边，有三座古老的桥和一个很大的市场，"),
        ask("Tell me about the town.", REPORT),
        ask("Tell me about the town.", REPORT[: REPORT.index("four yards") + 7]),
        ask("Sort a list in Python.", "Use sorted:\n```python\nprint(sorted([3, 1]))"),
        ask("List steps to plant garlic.", "1. Dig a furrow.\n2. Set the cloves.\n3."),
        ask("Give me the order as JSON.", '{"id": 4, "lines": [{"sku": "kite", "count"'),
        ask("What do I need for a cake?", "You need flour, eggs, butter,"),
        ask("How do I reset it?", "That is easy. Follow these steps:"),
        ask("Explain tides.", "Tides come from the pull of the moon. They are strongest when the sun and the"),
        ask("Name parts of a ship.", "These are parts of any ship:\n\n        1. The hull.\n        2."),
        ask("Name parts of a ship.", "These are parts of any ship:\n1. The hull.\n2.\n"),
        ask("Give me JSON.", '{"name": "Ann", "age": 31\n'),
    ],
    "repetition": [
        ask("Where is my parcel?", LOOP * 6),
        ask("Where is my parcel?", "Your parcel left the depot this morning. " + "It is on its way " * 12),
        ask("List reasons to walk.", "\n".join(f"{i}. It is good for you." for i in range(1, 9))),
        ask("Hello", "no no no no no no no no no no no no"),
        ask("What is pi?", "3.14159 and then " + "0" * 80),
        ask("Tell me about bees.", "Bees make honey. " + "Bees are very very useful to us and to " * 7),
        ask("蜜蜂是什么", "蜜蜂是一种非常有用的昆虫。" * 6),
    ],
    "markup_leftovers": [
        ask(Q, "<div>Plant the cloves in autumn.</div>"),
        ask(Q, "Plant the cloves&nbsp;in autumn."),
        ask(Q, "Plant in autumn.<br>Water once a week.<br/>"),
        ask(Q, "Assistant: Plant the cloves in autumn."),
        ask(Q, "Plant the cloves in autumn.\n\nHuman: And tulips?"),
        ask("Human: How do I plant garlic?\n\nAssistant:", "Plant the cloves in autumn."),
        ask(Q, 'See <a href="https://garden.example">this page</a> for more.'),
        ask("What is Smith &amp; Sons known for?", "For good shoes."),
    ],
    "language_mismatch": [
        ask(
            Q,
            "Planta los dientes de ajo en otoño, a unos cinco centímetros de profundidad, y riega una vez por semana.",
        ),
        ask(
            "¿Cómo se planta el ajo en un jardín pequeño? Tengo poco sitio y mucha sombra.",
            "Plant the cloves in autumn, two inches deep, and water them.",
        ),
        ask(
            "请问怎样在一个阳光不多的小花园里种植大蒜？需要注意哪些事情？请详细说明土壤、浇水和收获的时间。",
            "にんにくは秋に植えて、週に一度だけ水をやってください。土は水はけのよいものを選び、六月ごろに収穫します。",
        ),
        ask(Q, "秋天把蒜瓣种在土里，每周浇一次水就可以了。"),
        ask(
            "Wie pflanze ich Knoblauch in einem kleinen Garten, der wenig Sonne hat?",
            "Plant the cloves in autumn, and water them once in a week.",
        ),
        ask(Q, "Сажайте зубчики осенью на глубину пяти сантиметров и поливайте раз в неделю."),
        ask(
            "Comment planter de l'ail dans un petit jardin qui manque de soleil ?",
            "Los dientes se plantan en otoño y se riegan una vez por semana.",
        ),
        ask("ニンニクの植え方を教えてください。", "Plant the cloves in autumn, two inches deep, and water them."),
        ask(
            "Wie lange dauert die Fahrt in den Süden, und wie viel kostet sie in der Nacht?",
            "The trip to the south takes about four hours, and it costs thirty euros at night.",
        ),
        ask(
            "Hoe lang is de reis naar het zuiden en wat is de prijs in de nacht?",
            "The trip to the south takes about four hours, and it costs thirty euros at night.",
        ),
    ],
}
GOOD: dict[str, list[Record]] = {
    "refusal": [
        ask("My parcel is late.", "I'm sorry that your parcel is late. It will arrive on Monday."),
        ask("My parcel is late.", "Sorry, but the depot was closed on Friday, so it left today."),
        ask("Write a letter that declines an invitation.", "Dear Ann,\nI am sorry, but I cannot come on Sunday.\nBob"),
        ask("Write an excuse for my teacher.", "I'm sorry, but I am unable to come to class, since I have a fever."),
        ask("Rewrite politely: I can't help with that.", "I'm afraid I can't help with that."),
        ask("How does a refusal sound?", "A clerk may say: \"I'm sorry, but I can't help with that.\""),
        ask("Can dogs eat grapes?", "Unfortunately, dogs cannot eat grapes: they are toxic."),
        ask("I cannot sleep.", "You cannot force sleep, but a fixed bedtime helps."),
    ],
    "assistant_boilerplate": [
        ask("Are you a human?", "As an AI, I am not."),
        ask("Who are you?", "I am an AI assistant of the garden shop."),
        ask("What is AI?", "AI is software that learns from data. As an AI engineer, you build it."),
        ask("Explain language models.", "A large language model predicts the next word."),
        ask("Say what a bot says.", 'It says "As an AI language model, I cannot feel."'),
        ask("Introduce Ann.", "I am an AI researcher from Oslo."),
        ask("Remove the cliche: As an AI language model, I like tea.", "As an AI language model, I enjoy tea."),
    ],
    "foreign_identity": [
        ask("Who made ChatGPT?", "ChatGPT was created by OpenAI."),
        ask("Write a line for a painter.", "My name is Claude Monet, and I paint lilies."),
        ask("What is your sign?", "I am a Gemini, born in June."),
        ask("Compare two models.", "Claude is made by Anthropic, Qwen by Alibaba."),
        ask("Who are you?", "I am ChatGPT.", ("system", "You are ChatGPT, a persona of this exam.")),
        ask("How does a bot begin?", 'It says "I am ChatGPT" and waits.'),
        ask("Write a CV line.", "I am a Microsoft engineer, and I was trained by the best."),
    ],
    "placeholder_text": [
        ask("How many moons has Venus?", "None."),
        ask("Write a template for a letter.", "Dear [Your Name],\nthank you."),
        ask("Index a list in Python.", "Use `items[name]`, as in:\n```python\nitems[number]\n# TODO: more\n```"),
        ask("What does NaN mean?", "NaN means not a number."),
        ask("What is a to-do list?", "A list of what is left to do, TODO for short."),
        ask("Link to the docs.", "See [link](https://docs.example)."),
        ask("Where can I reach Ann?", "Write to [EMAIL] or call [PHONE]; do not send her key, [AWS_KEY]."),
        ask("Correct: Dear [Name], how is you?", "Dear [Name], how are you?"),
        ask("What does lorem ipsum mean?", "It is filler text; lorem ipsum is not real Latin."),
    ],
    "prompt_echo": [
        ask(Q, "To plant garlic in a small garden, set the cloves in autumn."),
        ask("Repeat after me: the sea is wide and blue.", "Repeat after me: the sea is wide and blue."),
        ask("The capital of France is", "The capital of France is Paris."),
        ask("Fix the grammar.\n\nHe go home today.", "He goes home today."),
        ask(
            "Once upon a time there was a king.\n\nContinue the story.",
            "Once upon a time there was a king.\nHe had no crown.",
        ),
        ask("Hello there!", "Hello there! How can I help?"),
        ask("Who was Ada?", "Who was Ada? Ada Lovelace wrote the first program."),
        ask("什么是光合作用？", "什么是光合作用？它把光能变成化学能。"),
        ask("床前明月光，疑是地上霜", "床前明月光，疑是地上霜，举头望明月，低头思故乡。"),
        ask("请重复：大海又宽又蓝又深。", "请重复：大海又宽又蓝又深。"),
    ],
    "truncated_response": [
        ask("介绍一下这座城市。", "这座城市位于河边，有三座古老的桥和一个很大的市场"),
        ask("列出三种水果。", "苹果、香蕉、梨"),
        ask("Tell me about the town.", REPORT + " three rooms."),
        ask("Write a poem.", POEM),
        ask("Classify the message.", "billing"),
        ask("Write a title.", "A Short History of the Harbor and Its Ships"),
        ask("Give me a CSV.", CSV),
        ask("List fruits.", "- apples\n- pears\n- a fig or two"),
        ask("Write a letter.", "Dear Ann,\nthank you for the kite. We fly it daily.\n\nKind regards,\nBob"),
        ask("Sort a list in Python.", "Use sorted:\n```python\nprint(sorted([3, 1]))\n```"),
        ask("Write a post.", "Our kites are back in stock. Come and see them! #kites #summer"),
        ask("A quote, please.", "Stay hungry. Stay foolish. - Steve Jobs"),
    ],
    "repetition": [
        ask("Repeat hello ten times.", "hello " * 10),
        ask("Write a song with a refrain.", "Row your boat\n" * 6),
        ask("Print a table.", "\n".join(f"| row {i} | value {i * 7} |" for i in range(12))),
        ask("Show a loop in C.", "```c\n" + "printf(x);\n" * 8 + "```"),
        ask("That was funny.", "Ha ha ha, it was! I still laugh about the goat."),
        ask(
            "List the planets.",
            "\n".join(f"{n}. {p} is a planet." for n, p in enumerate(("Mercury", "Venus", "Earth", "Mars"), 1)),
        ),
        ask("Draw a line.", "-" * 80),
    ],
    "markup_leftovers": [
        ask("Write an HTML page.", "<html><body><div>Hi</div></body></html>"),
        ask("How do I break a line in HTML?", "Use <br> where the line ends."),
        ask("Show a div.", "```html\n<div>Hi</div>\n```"),
        ask("What is a generic list in Java?", "A List<String> holds strings; a < b and c > d compare."),
        ask("Write a dialogue between a user and a bot.", "User: Hi\nBot: Hello"),
        ask("What does R&D mean?", "Research & development; see also AT&T."),
        ask("Which header does printf need?", "It needs <stdio.h> at the top."),
        ask("How should I escape an ampersand?", "Write &amp; in its place."),
    ],
    "language_mismatch": [
        ask(
            "Translate into Spanish: Plant the cloves in autumn and water them.",
            "Planta los dientes de ajo en otoño y riégalos.",
        ),
        ask(
            "How do you say it in French? I would like two coffees.",
            "Je voudrais deux cafés, s'il vous plaît, avec un peu de lait.",
        ),
        ask(
            "Wie pflanze ich Knoblauch in einem kleinen Garten?",
            "Stecken Sie die Zehen im Herbst in die Erde und gießen Sie sie wöchentlich.",
        ),
        ask("Hola", "Hello! How can I help you with your garden today?"),
        ask(
            "What does this poem mean: Caminante, son tus huellas el camino y nada más?",
            "It says that a walker makes the path by walking on it.",
        ),
        ask("Write a loop.", "for item in items:\n    print(item.name, item.value, item.weight)"),
        ask("日本の首都にある都庁の住所を、漢字で書いてください。", "東京都新宿区西新宿二丁目八番一号"),
        ask(
            "次の会社案内から、会社の名前と所在地と代表者の名前を、表の形にまとめて書き出していただけますか。お願いします。",
            "会社名：株式会社東京製作所、所在地：東京都千代田区丸の内一丁目一番一号、代表取締役社長：山田太郎、設立年月日：昭和四十五年四月一日",
        ),
        ask(
            Q, "Plantez les gousses en automne et arrosez une fois par semaine.", ("system", "Always answer in French.")
        ),
        ask(
            "Sum it up.\n\nEl ajo se planta en otoño y se riega una vez por semana.",
            "Garlic is planted in autumn and watered once in a week.",
        ),
    ],
}


def found(name: str, record: Record) -> str | None:
    return content_facts([record])[name][0]


@pytest.mark.parametrize(("name", "record"), [(name, record) for name in NAMES for record in BAD[name]])
def test_a_check_finds_what_was_planted(name: str, record: Record) -> None:
    assert found(name, record)


@pytest.mark.parametrize(("name", "record"), [(name, record) for name in NAMES for record in GOOD[name]])
def test_a_check_ignores_similar_but_correct_text(name: str, record: Record) -> None:
    assert found(name, record) is None


def test_every_check_has_six_planted_answers_of_each_kind() -> None:
    assert list(BAD) == list(GOOD) == NAMES
    assert all(len(rows) >= 6 for rows in [*BAD.values(), *GOOD.values()])


def test_content_checks_never_drop_a_row_unless_asked_to() -> None:
    assert {ROW_CHECKS[name].action for name in NAMES} == {"warn"}
    assert {ROW_CHECKS[name].severity for name in NAMES} <= {"warn", "info"}
    rows = [{**BAD[name][0], "source": "rows.jsonl", "source_row": i} for i, name in enumerate(NAMES)]
    assert not any(judge(rows, [], Rules()).reason)
    dropped = judge(rows, [], Rules(policy=dict.fromkeys(NAMES, "drop"))).reason
    assert all(dropped)


def test_a_finding_names_the_row_and_shows_what_was_found() -> None:
    rows = [
        {**row, "source": "rows.jsonl", "source_row": i}
        for i, row in enumerate([GOOD["refusal"][0], BAD["refusal"][0]])
    ]
    (finding,) = [
        one
        for one in document("set", "messages", judge(rows, [], Rules()), [])["findings"]
        if one["check"] == "refusal"
    ]
    assert (finding["count"], finding["places"]) == (1, ["rows.jsonl:1"])
    assert finding["examples"] == ["refusal: 'I'm sorry, but I can't help with that.'"]
    assert finding["note"] == "refusal 1" and finding["next"] == CHECKS["refusal"].hint


def test_every_answer_of_a_conversation_is_checked() -> None:
    turns = [
        ("user", Q),
        ("assistant", "I'm sorry, but I can't help with that."),
        ("user", "Why?"),
        ("assistant", "It is winter."),
    ]
    assert found("refusal", chat(*turns))


def test_only_the_chosen_answer_of_a_pair_is_checked() -> None:
    refusal = [{"role": "assistant", "content": "I'm sorry, but I can't help with that."}]
    good = ask(Q, "Plant the cloves in autumn.")
    assert found("refusal", {**good, "asked": 1, "rejected": refusal}) is None
    assert found("refusal", {**ask(Q, refusal[0]["content"]), "asked": 1, "rejected": good["messages"][1:]})


def test_benchmark_questions_have_no_answers_to_check() -> None:
    assert found("placeholder_text", {**ask(Q, "N/A"), "labelled": True}) is None


def test_findings_are_masked() -> None:
    key = "AKIA" + "Q3EXAMPLE7KEY2AB"
    shown = content_facts([ask(Q, f"I'm sorry, but I can't help with that. Use {key} or ann.lee@kites.co.uk instead")])
    said = json.dumps(shown)
    assert "refusal: " in said and key not in said and "ann.lee" not in said


STOP = re.compile(r"(?<!\d)(?<!\b[A-Z])(?<!\bMr)(?<!\bDr)(?<!\bMrs)(?<!\bSt)[.!?…。！？][\"'”’)\]*_]*(?:\s|\Z)")
CODE = re.compile(r"[{}=\\;|<>]|\b\w+\(|://|^\s{4,}\S|^[^\S\n]*+(?:#|//|import |def |class |SELECT )")
PARTS = [*'aB1É²._!?…。"”)]*({=/#-ß\t,:', "Dr", "Mr", "Mrs", "St", "://", "import ", "def ", "    ", "f(", "the"]


def test_ends_of_sentences_and_code_are_found_as_defined() -> None:
    """The patterns in use look at fewer characters than the definitions."""
    dice = random.Random(1)
    for size in [2, 8, 40, 100] * 300:
        line = "".join(dice.choices([*dice.sample(PARTS, dice.randint(2, 12)), " ", "a"], k=size))
        assert [m.span() for m in content._STOP.finditer(line)] == [m.span() for m in STOP.finditer(line)], line
        assert content._is_code(line) == bool(CODE.search(line)), line
        assert all(content._has_words(line, n) == (len(line.split()) >= n) for n in (1, 3, 30)), line


SEARCHED = {
    name: value
    for name, value in vars(content).items()
    if isinstance(value, re.Pattern)
    and (name in {"_TAG", "_ENTITY"} or f"first_match({name}, " in Path(content.__file__).read_text(encoding="utf-8"))
}
SPOKEN_WORDS = (
    "As an a AI language model assistant , . I developed made trained am 'm just chatbot engineer my knowledge cutoff"
    " training data up to latest update do not have any personal opinions 作为 一个 助手 als KI, como una IA, ChatGPT"
    " OpenAI Claude Google by created was the team at Qwen call me this is 我是 ich bin je suis soy your [ < { insert"
    ' fill in ] > } name recipient \'s first [date] ( {{ }} a_b lorem ipsum please xx <div class="x"> </p> <br/> <!--'
    " --> &nbsp; &#39; ; = \x1c \u00a0 é İ ı ſ \u212a \ud800 User: Human: Assistant: ** > # AI: dialog script repeat"
    " echo write translate who are you about yourself times html css code template blank 2.1 \n"
)
SPOKEN = [*SPOKEN_WORDS.split(" ")]


@pytest.mark.parametrize("name", SEARCHED)
def test_long_texts_are_searched_as_short_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_search, "LONG", 0)
    dice = random.Random(name)
    for size in [5, 20, 60] * 60:
        text = dice.choice([" ", "", "\n"]).join(dice.choices(dice.sample(SPOKEN, dice.randint(2, 14)), k=size))
        match, found = SEARCHED[name].search(text), text_search.first_match(SEARCHED[name], text)
        assert (match and match.span()) == (found and found.span()), text


@pytest.mark.parametrize("name", ["_TAG", "_ENTITY"])
def test_markup_is_taken_out_of_long_texts_as_of_short_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_search, "LONG", 0)
    dice, taken = random.Random(name), 0
    marks = [
        "<div>",
        "</P>",
        "<br/>",
        "<h1 x='",
        "'>",
        "<!--",
        "-->",
        "&nbsp;",
        "&#39;",
        "&#xe9;",
        "&",
        ";",
        "<",
        ">",
        "\x1c",
        "\n",
        " ",
        "a",
        "é",
    ]
    for size in [5, 20, 60] * 100:
        text = "".join(dice.choices(dice.sample([*marks, *dice.sample(SPOKEN, 10)], dice.randint(2, 14)), k=size))
        for words in (text, text.encode("ascii", "ignore").decode()):
            assert text_search.without_matches(SEARCHED[name], words) == SEARCHED[name].sub("", words), words
            taken += words.isascii() and SEARCHED[name].search(words) is not None
    assert taken > 100


def test_halves_of_surrogate_pairs_become_one_replacement_character_each() -> None:
    dice = random.Random(1)
    codes = [0x61, 0xE9, 0xD7FF, 0xD800, 0xDBFF, 0xDC00, 0xDFFF, 0xE000, 0xFFFD, 0x1F3F4]
    for size in [0, 1, 2, 5, 20] * 200:
        text = "".join(map(chr, dice.choices(codes, k=size)))
        assert [*text_search.text_column([text, "\ud800"])] == [
            re.sub("[\ud800-\udfff]", "\ufffd", text),
            "\ufffd",
        ], ascii(text)


def test_comments_that_are_not_closed_change_no_search() -> None:
    dice = random.Random(1)
    for size in [3, 8, 30] * 200:
        text = "".join(dice.choices(["<!--", "-->", "<br>", "html", "<div a='", ">", " ", "\n", "-"], k=size))
        closed = content._without_open_comments(text)
        assert [match.span() for match in content._TAG.finditer(text)] == [
            match.span() for match in content._TAG.finditer(closed)
        ], text
        assert content._TAG.sub("", text).replace("<!--", "<!  ") == content._TAG.sub("", closed).replace(
            "<!--", "<!  "
        ), text
