"""Measures of tool calls, and evaluation of conversations with tools from questions to the comparison page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.records import stored
from conftest import evaluate

from dagster_project.core.messages import Call
from dagster_project.core.records import read_table, write_records, write_table
from dagster_project.core.tool_schemas import call_problem
from dagster_project.evaluation import ballots, judge
from dagster_project.evaluation.alarms import scores_differ
from dagster_project.evaluation.baselines import with_shots
from dagster_project.evaluation.comparison import board
from dagster_project.evaluation.evaluator import (
    EvaluatedModel,
    Settings,
    result_rows,
    result_schema,
    select_questions,
    write_results,
)
from dagster_project.evaluation.labels import LabelTask
from dagster_project.evaluation.paired.pairwise import match
from dagster_project.evaluation.retention import retention_schema
from dagster_project.evaluation.scoring import Scoring
from dagster_project.evaluation.tool_calls import is_valid, same_calls, same_names
from dagster_project.stages import comparison
from dagster_project.training.inference.answers import Answer, of_message
from dagster_project.views.ballot import ballot_page

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "ping"}},
]


def call(name: str, **arguments: Any) -> Call:
    return Call(name, arguments, None)


def made(*calls: Call) -> Answer:
    return Answer("", calls=calls)


OSLO, ROME, PING = call("weather", city="Oslo"), call("weather", city="Rome"), call("ping")


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (OSLO, None),
        (call("weather", city="Oslo", days=3), None),
        (call("weather", city="Oslo", days=3.0), None),
        (PING, None),
        (call("ping", anything=[1]), None),
        (call("pong"), "unknown tool 'pong'"),
        (call("weather"), "$: 'city' is a required property"),
        (call("weather", city=3), "$.city: 3 is not of type 'string'"),
        (call("weather", city="Oslo", days=0), "$.days: 0 is less than the minimum of 1"),
        (call("weather", city="Oslo", town="x"), "$: Additional properties are not allowed ('town' was unexpected)"),
        (Call("weather", '{"city": "Os', None), "arguments are not a JSON object"),
        (Call("", "garbage", None), "unknown tool ''"),
    ],
)
def test_a_call_fits_the_tools_or_the_problem_is_named(one: Call, why: str | None) -> None:
    assert call_problem(one, TOOLS) == why
    assert is_valid(made(one), TOOLS) == (why is None)


def test_types_may_have_the_names_of_python() -> None:
    tools = [
        {
            "name": "weather",
            "parameters": {"type": "dict", "properties": {"city": {"type": "str"}}, "required": ["city"]},
        }
    ]
    assert call_problem(OSLO, tools) is None
    assert call_problem(call("weather", city=3), tools) == "$.city: 3 is not of type 'string'"


def test_an_answer_without_calls_is_not_valid_and_one_bad_call_is_enough() -> None:
    assert not is_valid(Answer("It is cold."), TOOLS)
    assert is_valid(made(OSLO, PING), TOOLS) and not is_valid(made(OSLO, call("pong")), TOOLS)


@pytest.mark.parametrize(
    "parameters", [{"type": "thing"}, {"$ref": "https://example.org/schema"}, {"$ref": "#/nowhere"}]
)
def test_a_tool_with_an_invalid_schema_accepts_any_object(parameters: dict[str, Any]) -> None:
    assert call_problem(OSLO, [{"name": "weather", "parameters": parameters}]) is None


@pytest.mark.parametrize(
    ("reference", "answer", "names", "exact"),
    [
        ([OSLO], [OSLO], True, True),
        ([call("f", a=1, b=2)], [call("f", b=2, a=1)], True, True),
        ([call("f", a={"x": 1, "y": [1, 2]})], [call("f", a={"y": [1, 2], "x": 1})], True, True),
        ([call("f", a=[1, 2])], [call("f", a=[2, 1])], True, False),
        ([call("f", a=3)], [call("f", a=3.0)], True, True),
        ([call("f", a=1)], [call("f", a=True)], True, False),
        ([call("f", a=1)], [call("f", a="1")], True, False),
        ([OSLO, ROME], [ROME, OSLO], True, True),
        ([OSLO, OSLO], [OSLO], False, False),
        ([OSLO, OSLO], [OSLO, ROME], True, False),
        ([OSLO], [PING], False, False),
        ([OSLO], [], False, False),
        ([OSLO._replace(identity="call_1")], [OSLO], True, True),
    ],
)
def test_calls_are_compared_as_json_in_any_order(
    reference: list[Call], answer: list[Call], names: bool, exact: bool
) -> None:
    assert (same_names(made(*reference), made(*answer)), same_calls(made(*reference), made(*answer))) == (names, exact)


def dialogue(i: int, *, asks: bool = True) -> dict[str, Any]:
    """A question, a call, its result and a reply; or, if it does not ask, a
    question that is answered at once although tools are offered."""
    city = f"City {i}"
    question = {"role": "user", "content": f"How cold is {city}?"}
    reply = {"role": "assistant", "content": f"It is {i} degrees cold in {city}."}
    middle = (
        [made(call("weather", city=city)).message, {"role": "tool", "content": str(i), "name": "weather"}]
        if asks
        else []
    )
    return stored(question, *middle, reply, tools=TOOLS)


def test_every_turn_with_calls_is_a_question_and_the_last_turn_too() -> None:
    task, questions = select_questions([dialogue(0), dialogue(1, asks=False)], Settings())
    assert task is None
    assert [(q["example_id"], q.get("turn"), len(q["messages"])) for q in questions] == [
        (dialogue(0)["example_id"], 1, 2),
        (dialogue(0)["example_id"], None, 4),
        (dialogue(1, asks=False)["example_id"], None, 2),
    ]


def test_turns_of_weight_0_are_not_questions_and_a_call_at_the_end_is_one() -> None:
    left_out, final = dialogue(0), dialogue(1)
    left_out["messages"][1]["weight"] = left_out["messages"][3]["weight"] = 0
    final["messages"] = final["messages"][:2]
    assert select_questions([left_out, final], Settings())[1] == [final]


def test_scores_of_calls_and_of_text_by_hand() -> None:
    """Four examples: three with a call and a reply, one with a reply alone."""
    records = [dialogue(0), dialogue(1), dialogue(2), dialogue(3, asks=False)]
    scoring = Scoring(select_questions(records, Settings())[1], None, {})
    replies = [Answer(record["messages"][-1]["content"]) for record in records]
    answers = [
        made(call("weather", city="City 0")), replies[0],  # all right
        made(call("weather", city="Rome")), Answer("x"),  # another city; no word of the reply
        Answer("I cannot."), replies[2],  # no call
        made(call("weather")),  # a call that is not asked for
    ]  # fmt: skip
    found = scoring.score(answers)
    assert (found["n"], found["n_text"], found["n_calls"]) == (7, 4, 3)
    assert found["tool_arguments_exact"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["tool_name_accuracy"] == found["tool_call_valid"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["rouge_l"] == found["exact_match"] == 0.5, "text measures cover the four replies"
    assert found["false_call"] == 0.25, "of the four turns in which tools are offered and not called"
    assert scoring.statistics("rouge_l", answers).tolist() == [[1, 1], [0, 1], [1, 1], [0, 1]], "by example"
    assert scoring.marks(answers) == [1, 1, 0, 0, 0, 1, 0]
    assert list(scoring.names()) == ["rouge_l", "exact_match", "bleu", "chrf", *NAMES, "false_call"]


def test_text_before_a_call_is_not_scored_by_final_answers() -> None:
    """Neither it nor a wrong answer to it has a number, which is not the same number."""
    records = [dialogue(i) for i in range(3)]
    for record in records:
        record["messages"][1] |= {"content": "One moment."}
    settings = Settings(task={"final_answer": "number"})  # type: ignore[arg-type]
    task, questions = select_questions(records, settings)
    scoring = Scoring(questions, task, {})
    found = scoring.score([Answer("I do not know.")] * len(questions))
    assert (found["n_text"], found["accuracy"], found["no_final_answer"]) == (6, 0.0, 1.0)
    assert scoring.score(scoring.references)["no_final_answer"] == 0.0 and scoring.examples_of("accuracy") == 3
    task, questions = select_questions([records[0], records[1] | {"messages": records[1]["messages"][:2]}], settings)
    calls_alone = Scoring(questions[:1] + questions[2:], task, {})
    assert {"accuracy", "no_final_answer"}.isdisjoint(calls_alone.names()) and "rouge_l" in calls_alone.score(
        calls_alone.references
    )


def test_examples_that_a_measure_does_not_cover_change_neither_its_interval_nor_its_alarm() -> None:
    records = [
        dialogue(0, asks=False),
        *(dialogue(i) | {"messages": dialogue(i)["messages"][:2]} for i in range(1, 30)),
    ]
    scoring = Scoring(select_questions(records, Settings())[1], None, {})
    right = scoring.references
    found = scoring.score(right)
    assert (found["n_text"], found["n_calls"]) == (1, 29)
    assert found["rouge_l_interval"] == found["tool_name_accuracy_interval"] == [1, 1]
    assert scoring.statistics("rouge_l", right).tolist() == [[1, 1]] and scoring.statistics(
        "false_call", right
    ).tolist() == [[0, 1]]
    differ = scores_differ({"tool_name_accuracy": [scoring.statistics("tool_name_accuracy", right)] * 2})
    assert differ.note.startswith("tool_name_accuracy is the same for all 58 answers; ")


NAMES = ("tool_arguments_exact", "tool_name_accuracy", "tool_call_valid")


def test_calls_decide_where_at_least_half_of_the_answers_are_calls() -> None:
    for calls, texts, first in ((1, 0, NAMES[0]), (1, 1, "rouge_l"), (2, 1, "rouge_l")):
        records = [dialogue(i) for i in range(calls)] + [dialogue(9 + i, asks=False) for i in range(texts)]
        assert next(iter(Scoring(select_questions(records, Settings())[1], None, {}).names())) == first


def test_under_a_task_with_labels_the_label_decides_for_every_system() -> None:
    """The classical classifier, which predicts labels, has no score of calls."""
    records = [
        dialogue(i) | {"messages": [*dialogue(i)["messages"][:1], {**made(OSLO).message, "content": "cold"}]}
        for i in range(2)
    ]
    task, questions = select_questions(records, Settings(task=LabelTask(labels=["cold", "warm"])))
    scoring = Scoring(questions, task, {})
    names = [list(scoring.names(writes)) for writes in (True, False)]
    assert [found[:2] for found in names] == [["macro_f1", "accuracy"]] * 2
    silent = [Answer("cold")] * 2
    assert scoring.mark_name == "accuracy" and scoring.marks(silent) == scoring.marks(silent, writes=False) == [1, 1]
    assert set(NAMES) < set(names[0]) and not set(NAMES) & set(names[1])
    scores = {
        name: scoring.score(scoring.references, name != "tfidf_logistic") for name in ("zero_shot", "tfidf_logistic")
    }
    assert len(board(names[0][:2], scores, {})) == 4


def test_nothing_is_concluded_from_a_few_examples_with_calls_among_many_answers(tmp_path: Path) -> None:
    """Of forty test examples twenty have a call, which decides."""
    records = [dialogue(i) | {"messages": dialogue(i)["messages"][:2]} for i in range(20)] + [
        dialogue(i, asks=False) for i in range(20, 40)
    ]
    right = [of_message(record["messages"][-1]) for record in records]
    for split, rows in (("train", []), ("validation", []), ("test", records)):
        write_records(tmp_path / "splits" / split, rows)
    for folder, system, answers in (("baselines", "zero_shot", [Answer("x")] * 40), ("one", "one", right)):
        scored = result_rows(system, records, None, answers, [9] * 40, [(1.0, 3)] * 40)
        base = result_rows("base", records, None, likelihoods=[(9.0, 3)] * 40) if folder == "baselines" else []
        write_results(tmp_path / folder / "results.parquet", [*scored, *base])
        write_table(tmp_path / folder / "retention.parquet", [], retention_schema())
    (tmp_path / "training.json").write_text('{"tokens": 9, "trained_tokens": 3, "steps": 1}')
    variants = {"one": comparison.Variant(tmp_path / "one", tmp_path / "one", tmp_path / "training.json")}

    def compare() -> dict[str, Any]:
        comparison.produce(
            tmp_path,
            Settings(),
            variants,
            tmp_path / "splits",
            tmp_path / "baselines",
            tmp_path / "one",
            tmp_path / "out",
            tmp_path / "scores.csv",
            tmp_path / "pages",
        )
        found: dict[str, Any] = json.loads((tmp_path / "out" / "comparison.json").read_text())
        return found

    found = compare()
    assert (
        found["test"] == {"examples": 40, "answered": 40, "decided": 20, "questions": 20, "seen": 0}
        and found["shown"][0] == NAMES[0]
    )
    assert (
        found["advice"][0].startswith("Nothing can be concluded from 20 test examples: ")
        and not found["recommended"]["sure"]
    )
    write_records(
        tmp_path / "splits" / "test", [record | {"group_id": str(i // 2)} for i, record in enumerate(records)]
    )
    found = compare()
    assert found["test"] == {
        "examples": 40,
        "answered": 40,
        "decided": 10,
        "questions": 20,
        "independent": 20,
        "seen": 0,
    }
    assert found["advice"][0].startswith(
        "Nothing can be concluded from 10 test examples, near-copies counted once: at least 30"
    )


def test_results_of_plain_answers_have_no_further_columns(tmp_path: Path) -> None:
    plain = {key: value for key, value in dialogue(0, asks=False).items() if key != "tools"}
    write_results(tmp_path / "plain.parquet", result_rows("lora", [plain], None, [Answer("Cold.")]))
    assert list(read_table(tmp_path / "plain.parquet")[0]) == result_schema().names
    write_results(tmp_path / "rich.parquet", result_rows("lora", [plain], None, [made(OSLO)]))
    assert list(read_table(tmp_path / "rich.parquet")[0]) == result_schema(rich=True).names


def test_a_worked_example_with_calls_is_the_whole_conversation_without_traces() -> None:
    shot, plain = dialogue(1), dialogue(2, asks=False)
    shot["messages"] = [{"role": "system", "content": "Be brief."}, *shot["messages"]]
    shot["messages"][2] = {**shot["messages"][2], "reasoning_content": "Which city?", "weight": 0.0}
    asked = with_shots("Help.", [shot, plain], dialogue(3))
    assert asked == [
        {"role": "system", "content": "Help."},
        *dialogue(1)["messages"],
        *plain["messages"],
        *dialogue(3)["messages"][:-1],
    ]


HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def tool_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template that writes tools, calls and results."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text("""{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""")
    return folder


def test_a_set_with_tools_is_evaluated_and_compared(
    tool_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's answers are planted: variants call as the reference does, baselines never call."""
    asked: dict[str, list[Any]] = {}

    def planted(self: Any, prompts: Any, what: str, thinking_tokens: int = 0, offers: Any = None) -> list[Answer]:
        asked[what] = list(zip(prompts, offers, strict=True))
        right = [
            made(call("weather", city=p[-1]["content"][12:-1])) if p[-1]["role"] == "user" else Answer(HOSTILE, HOSTILE)
            for p in prompts
        ]
        return right if what in {"one", "two"} else [Answer("I do not know.") for _ in prompts]

    monkeypatch.setattr(EvaluatedModel, "answer", planted)
    test, train = [dialogue(i) for i in range(32)], [dialogue(100 + i) for i in range(4)]
    root = tmp_path / "data"
    found = evaluate(root, tool_model, Settings(max_new_tokens=4), test, train)
    assert [offer.tools for _, offer in asked["one"]] == [TOOLS] * 64
    assert list(found["baselines"]) == ["base", "zero_shot", "few_shot", "retrieved"]
    assert [found["one"][name] for name in NAMES] == [1.0, 1.0, 1.0] and found["one"]["false_call"] == 0.0
    assert (
        found["baselines"]["zero_shot"]["tool_arguments_exact"]
        == found["baselines"]["zero_shot"]["tool_call_valid"]
        == 0.0
    )
    document = json.loads((root / "comparison/comparison.json").read_text())
    assert document["shown"] == ["tool_arguments_exact", "tool_name_accuracy"] and document["test"]["answered"] == 32
    assert document["compared"]["one"]["to"]["zero_shot"]["tool_arguments_exact"]["difference"] == 1.0
    assert document["recommended"]["sure"] and "points of same calls over" in " ".join(document["advice"])

    page = (root / "pages/comparison.html").read_text()
    for summary in (
        "calls weather",
        f"reasoning, {len(HOSTILE)} characters",
        "2 tools: weather, ping",
        "user, assistant (1 call), tool; 2 tools",
    ):
        assert f'<summary><bdi dir="auto">{summary}</bdi></summary>' in page
    assert (
        HOSTILE not in page
        and "&lt;img src=x onerror=alert(1)&gt;" in page
        and "default-src &#39;none&#39;" in page.replace("'", "&#39;")
    )

    rows = {(row["example_id"], row["turn"]): row for row in read_table(root / "evaluation/one/results.parquet")}
    turn, last = rows[test[0]["example_id"], 1], rows[test[0]["example_id"], None]
    assert json.loads(turn["tool_calls"])[0]["function"] == {"name": "weather", "arguments": {"city": "City 0"}}
    assert turn["nll"] is None and last["nll"] > 0 and last["reasoning"] == HOSTILE and last["answer"] == HOSTILE


def test_prompts_offer_the_tools_and_earlier_calls_as_in_training(tool_model: Path, tmp_path: Path) -> None:
    """Nothing is planted: the random model answers."""
    test, train = [dialogue(0), dialogue(1)], [dialogue(9)]
    evaluate(tmp_path / "data", tool_model, Settings(max_new_tokens=4), test, train)
    rows = read_table(tmp_path / "data/evaluation/one/results.parquet")
    for record in test:
        offered = "".join(json.dumps(tool) for tool in TOOLS)
        asked = record["messages"][0]["content"]
        text = f"<|im_start|>system\n{offered}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n"
        city = json.dumps(record["messages"][1]["tool_calls"][0]["function"]["arguments"])
        called = (
            f'<|im_start|>assistant\n<tool_call>\n{{"name": "weather", "arguments": {city}}}\n</tool_call><|im_end|>\n'
        )
        result = f"<|im_start|>tool\n{record['messages'][2]['content']}<|im_end|>\n"
        header = "<|im_start|>assistant\n"
        lengths = {row["turn"]: row["prompt_tokens"] for row in rows if row["example_id"] == record["example_id"]}
        marks = {"<|im_start|>": "S", "<|im_end|>": "E"}
        for turn, prompt in ((1, text + header), (None, text + called + result + header)):
            for mark, one in marks.items():
                prompt = prompt.replace(mark, one)
            assert lengths[turn] == len(prompt.encode()), "the tokenizer has one token per byte"
    assert {row["turn"] for row in rows} == {1, None}


def answered(folder: Path) -> None:
    """Two systems: `lora` calls the weather and `few_shot` pings; both give the same reply in the last turn."""
    (folder / "data/splits").mkdir(parents=True)
    (folder / "params.yaml").write_text("adapter: {lora: {}}\n")
    write_records(folder / "data/splits/test", [dialogue(i) for i in range(4)])
    questions = select_questions([dialogue(i) for i in range(4)], Settings())[1]
    systems = {
        "few_shot": ("baselines", made(PING)),
        "lora": ("evaluation/lora", Answer(HOSTILE, f"Think {HOSTILE}", (OSLO,))),
    }
    for name, (place, said) in systems.items():
        answers = [said if "turn" in question else Answer("Same.") for question in questions]
        write_results(folder / f"data/{place}/results.parquet", result_rows(name, questions, None, answers))


def test_ballots_and_judges_get_the_calls(tmp_path: Path) -> None:
    answered(tmp_path)
    found = match(tmp_path, ("lora", "few_shot"), seed=7)
    assert len(found.pairs) == 4 and found.identical == 4
    pair = found.pairs[0]
    assert [message["role"] for message in pair.prompt] == ["user"] and pair.tools == TOOLS
    assert pair.answers == (HOSTILE, "") and [len(turn["tool_calls"]) for turn in pair.turns] == [1, 1]

    asked = json.loads(judge._question(pair, pair.turns)[1]["content"])
    assert asked["answer_a"] == {"content": HOSTILE, "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]}
    assert (
        asked["answer_b"] == {"content": "", "tool_calls": [{"name": "ping", "arguments": {}}]}
        and asked["tools"] == TOOLS
    )
    assert "Think" not in json.dumps(asked), "traces are not judged"

    document = ballots.document(found, 4)
    page = ballot_page(document)
    assert "lora" not in page and HOSTILE not in page
    folds = json.loads(page.partition('id="ballot-data">')[2].partition("</script>")[0])["pairs"][0]["folds"]
    assert [[summary for summary, _, _ in each] for each in folds["prompt"]] == [["2 tools: weather, ping"], []]
    titles = [[summary for summary, _, _ in each] for each in folds["answers"]]
    assert sorted(titles) == [["calls ping"], [f"reasoning, {len(f'Think {HOSTILE}')} characters", "calls weather"]]
    votes = {"Ann": {one.id: "b" if one.swapped else "a" for one in found.pairs}}
    won = ballots.preferences(found, votes)
    assert won[0]["tools"] == TOOLS and won[0]["chosen"] == [pair.turns[0]] and won[0]["rejected"] == [pair.turns[1]]
