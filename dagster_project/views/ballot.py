"""A ballot -> one HTML page on which people vote blindly between two answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from dagster_project.views import html

_ANSWER = '<article class="pair side" aria-labelledby="answer-{0}"><small id="answer-{0}">Answer {0}</small><p><bdi dir="auto"></bdi></p></article>'
_CHOICE = '<button type="button" data-vote="{0}" aria-pressed="false" aria-keyshortcuts="{1}">{2}</button>'
VOTE = (
    '<div id="pager"><output id="hits" aria-live="polite" tabindex="-1"></output><span>'
    '<button id="back" type="button" aria-keyshortcuts="ArrowLeft">← Back</button>'
    '<button id="on" type="button" aria-keyshortcuts="ArrowRight">Next →</button></span></div>'
    '<article class="pair" aria-labelledby="asked"><small id="asked">Prompt</small><div id="prompt"></div></article>'
    f'<div class="sides">{_ANSWER.format("A")}{_ANSWER.format("B")}</div><p id="choices" role="group" aria-label="Your vote">Your vote'
    f"{_CHOICE.format('a', 'a', 'A is better')}{_CHOICE.format('tie', 't', 'Tie')}{_CHOICE.format('b', 'b', 'B is better')}</p>"
)
SAVE = (
    '<div id="filter"><label class="wide">Your name or initials<input id="rater" autocomplete="off" maxlength="100" spellcheck="false"></label>'
    '<button id="download" type="button" class="wide">Save votes to a file</button></div><p class="sum"><output id="saved" aria-live="polite"></output></p>'
)


def page(ballot: Mapping[str, Any]) -> str:
    """A ballot: one HTML file that takes votes by keyboard or mouse and saves them to a file. It names no system.

    Args:
        ballot: `evaluation.ballots.document`.
    """
    shown = [
        {
            "id": pair["id"],
            "prompt": [[message["role"], html.visible(message["content"])] for message in pair["prompt"]],
            "answers": [html.visible(answer) for answer in pair["answers"]],
        }
        for pair in ballot["pairs"]
    ]
    data = json.dumps({"ballot": ballot["ballot"], "pairs": shown}, separators=(",", ":"), ensure_ascii=False)
    raw = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    head = (
        f'<header class="head"><p class="over">Ballot {ballot["ballot"]}</p><h1>Which answer is better?</h1></header>'
        f'<p class="note">{html.many(len(shown), "pair")} of answers, in random order. Keys: <b>a</b> or <b>b</b> for the better answer, <b>t</b> for a tie, '
        "<b>←</b> and <b>→</b> to look around. Votes stay in this browser until you save them; the page loads nothing and sends nothing.</p>"
        '<noscript><p class="verdict warn">Voting needs JavaScript, which is off here.</p></noscript>'
    )
    return html.page(
        "Ballot",
        head,
        {"Vote": VOTE, "Save": SAVE + f'<script type="application/json" id="ballot-data">{raw}</script>'},
        "Made by <b>pedigree ballots export</b>.",
        script=resources.files(__package__).joinpath("ballot.js").read_text("utf-8"),
    )
