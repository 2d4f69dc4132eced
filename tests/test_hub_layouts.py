"""Rows with the columns of data sets that many people use: `pedigree check` and `init` read each in the right layout,
or refuse it with a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dagster_project.commands import init_data
from dagster_project.core.errors import InputError
from dagster_project.curation.check_files import check_paths, load
from dagster_project.curation.sources.fields import taken
from dagster_project.curation.sources.message import joined_calls
from dagster_project.curation.sources.part_messages import answered

USER, BOT, BAD = ({"role": role, "content": text} for role, text in
                  (("user", "Hi"), ("assistant", "Hello"), ("assistant", "What?")))  # fmt: skip
CHAT, WORSE = [USER, BOT], [USER, BAD]
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
HUMAN = "\n\nHuman: Hi\n\nAssistant:"
TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "t",
        "text": "Hi",
        "role": "prompter",
        "lang": "en",
        "replies": [
            {"message_id": "u", "parent_id": "t", "text": text, "role": "assistant", "rank": rank, "replies": []}
            for text, rank in (("What?", 1), ("Hello", 0))
        ],
    },
}
TOOL = {"name": "f", "description": "F.", "parameters": {"x": {"type": "str", "description": "X."}}}
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "HuggingFaceH4/no_robots": ("messages", {"prompt": "Hi", "prompt_id": "a", "messages": CHAT, "category": "Chat"}),
    "HuggingFaceH4/ultrachat_200k": ("messages", {"prompt": "Hi", "prompt_id": "a", "messages": CHAT}),
    "HuggingFaceTB/smoltalk": ("messages", {"messages": CHAT, "source": "smol-magpie-ultra"}),
    "HuggingFaceTB/smoltalk2": (
        "messages",
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}, "source": "x"},
    ),
    "allenai/tulu-3-sft-mixture": ("messages", {"id": "a", "messages": CHAT, "source": "x"}),
    "AI-MO/NuminaMath-CoT": ("messages", {"source": "x", "problem": "Hi", "solution": "Hello", "messages": CHAT}),
    "open-r1/OpenR1-Math-220k": (
        "messages",
        {"problem": "Hi", "solution": "x", "answer": "1", "messages": CHAT, "generations": ["Hello"]},
    ),
    "Open-Orca/SlimOrca": (
        "sharegpt",
        {"conversations": [{**TURNS[0], "weight": 0.0}, {**TURNS[1], "weight": 1.0}]},
    ),
    "teknium/OpenHermes-2.5": (
        "sharegpt",
        {"conversations": TURNS, "system_prompt": None, "category": "x", "skip_prompt_formatting": None, "source": "x"},
    ),
    "open-thoughts/OpenThoughts-114k": ("sharegpt", {"system": "", "conversations": TURNS}),
    "open-thoughts/OpenThoughts3-1.2M": (
        "sharegpt",
        {"difficulty": None, "source": "x", "domain": "math", "conversations": TURNS},
    ),
    "anon8231489123/ShareGPT_Vicuna_unfiltered": ("sharegpt", {"id": "a_0", "conversations": TURNS}),
    "WizardLM_evol_instruct_V2_196k": ("sharegpt", {"idx": "a", "conversations": TURNS}),
    "Team-ACE/ToolACE": (
        "sharegpt",
        {"system": "", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
    ),
    "Salesforce/APIGen-MT-5k": ("sharegpt", {"conversations": TURNS, "tools": json.dumps([TOOL]), "system": ""}),
    "NousResearch/hermes-function-calling-v1": (
        "sharegpt",
        {"id": "a", "conversations": TURNS, "tools": json.dumps([TOOL]), "category": "x", "subcategory": "y"},
    ),
    "Salesforce/xlam-function-calling-60k": (
        "xlam",
        {
            "id": 0,
            "query": "Hi",
            "answers": json.dumps([{"name": "f", "arguments": {"x": "1"}}]),
            "tools": json.dumps([TOOL]),
        },
    ),
    "glaiveai/glaive-function-calling-v2": ("glaive", {"system": "SYSTEM: ", "chat": "USER: Hi\n\n\nASSISTANT: Hello"}),
    "allenai/WildChat-1M": (
        "conversation",
        {
            "conversation_hash": "a",
            "conversation": [{**one, "language": "English", "toxic": False} for one in CHAT],
            "turn": 1,
        },
    ),
    "lmsys/lmsys-chat-1m": ("conversation", {"conversation_id": "a", "model": "m", "conversation": CHAT, "turn": 1}),
    "LDJnr/Capybara": ("conversation", {"source": "x", "conversation": [{"input": "Hi", "output": "Hello"}]}),
    "Magpie-Align/Magpie-Pro-300K-Filtered": (
        "dolly",
        {"conversation_id": "a", "instruction": "Hi", "response": "Hello", "conversations": TURNS, "intent": "x"},
    ),
    "databricks/databricks-dolly-15k": (
        "dolly",
        {"instruction": "Hi", "context": "", "response": "Hello", "category": "open_qa"},
    ),
    "tatsu-lab/alpaca": ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello", "text": "Hi Hello"}),
    "garage-bAInd/Open-Platypus": (
        "alpaca",
        {"input": "", "output": "Hello", "instruction": "Hi", "data_source": "x"},
    ),
    "TIGER-Lab/MathInstruct": ("alpaca", {"source": "x", "output": "Hello", "instruction": "Hi"}),
    "Open-Orca/OpenOrca": ("openorca", {"id": "a", "system_prompt": "", "question": "Hi", "response": "Hello"}),
    "nvidia/HelpSteer2": ("prompt_response", {"prompt": "Hi", "response": "Hello", "helpfulness": 3, "verbosity": 2}),
    "CohereForAI/aya_dataset": ("flan", {"inputs": "Hi", "targets": "Hello", "language": "English", "user_id": "a"}),
    "microsoft/orca-math-word-problems-200k": ("question_answer", {"question": "Hi", "answer": "Hello"}),
    "stingning/ultrachat": ("ultrachat", {"id": "0", "data": ["Hi", "Hello"]}),
    "OpenAssistant/oasst1": ("oasst", TREE),
}
PAIRS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        "preference",
        [{"prompt": "Hi", "chosen": CHAT, "rejected": WORSE, "messages": CHAT, "score_chosen": 8.0}],
    ),
    "trl-lib/ultrafeedback_binarized": (
        "transcripts",
        [{"chosen": CHAT, "rejected": WORSE, "score_chosen": 8.0, "score_rejected": 5.0}],
    ),
    "argilla/dpo-mix-7k": (
        "transcripts",
        [{"dataset": "x", "chosen": CHAT, "rejected": WORSE, "chosen_rating": 5.0, "rejected_rating": 4.0}],
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        "transcripts",
        [{"source": "x", "conversation": [{"input": "Hi", "output": "x"}], "chosen": CHAT, "rejected": WORSE}],
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        "orca_dpo",
        [
            {
                "system": "",
                "input": "Hi",
                "chosen": "Hello",
                "rejected": "What?",
                "status": "unchanged",
                "rating": [9, 7],
            }
        ],
    ),
    "Intel/orca_dpo_pairs": (
        "orca_dpo",
        [{"system": "", "question": "Hi", "chosen": "Hello", "rejected": "What?"}],
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        "preference",
        [{"source": "x", "chosen": CHAT, "rejected": WORSE, "prompt": "Hi", "question": "Hi"}],
    ),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": (
        "preference",
        [{"id": "a", "source": "x", "prompt": "Hi", "chosen": CHAT, "rejected": WORSE}],
    ),
    "Magpie-Align/Magpie-Air-DPO-100K-v0.1": (
        "alpaca_dpo",
        [{"uuid": "a", "instruction": "Hi", "chosen": CHAT, "rejected": WORSE}],
    ),
    "Anthropic/hh-rlhf": ("transcripts", [{"chosen": f"{HUMAN} Hello", "rejected": f"{HUMAN} What?"}]),
    "Anthropic/hh-rlhf with other columns": (
        "transcripts",
        [{"chosen": f"{HUMAN} Hello", "rejected": f"{HUMAN} What?", "instruction": "Hi", "prompt": "x", "output": "y"}],
    ),
    "Dahoas/rm-static": (
        "preference",
        [{"prompt": HUMAN, "response": "Hello", "chosen": "Hello", "rejected": "What?"}],
    ),
    "trl-lib/kto-mix-14k": (
        "kto",
        [
            {"prompt": [USER], "completion": [BAD], "label": False},
            {"prompt": [USER], "completion": [BOT], "label": True},
        ],
    ),
    "berkeley-nest/Nectar": (
        "nectar",
        [
            {
                "prompt": HUMAN + " ",
                "answers": [
                    {"answer": "Hello", "model": "a", "rank": 1.0},
                    {"answer": "What?", "model": "b", "rank": 7.0},
                ],
                "turns": 1,
                "num_responses": 2,
                "source": ["x"],
                "good_natured": True,
            }
        ],
    ),
    "nvidia/HelpSteer3": (
        "helpsteer",
        [{"domain": "x", "context": [USER], "response1": "What?", "response2": "Hello", "overall_preference": 1}],
    ),
    "nvidia/HelpSteer2 preference": (
        "helpsteer",
        [{"split": "train", "prompt": "Hi", "response_1": "Hello", "response_2": "What?", "preference_strength": -1}],
    ),
    "stanfordnlp/SHP": (
        "shp",
        [{"post_id": "a", "history": "Hi", "human_ref_A": "What?", "human_ref_B": "Hello", "labels": 0, "score_A": 2}],
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        "pku_saferlhf",
        [
            {
                "prompt": "Hi",
                "response_0": "Hello",
                "response_1": "What?",
                "better_response_id": 0,
                "safer_response_id": 1,
            }
        ],
    ),
    "lmsys/chatbot_arena_conversations": (
        "arena",
        [
            {
                "question_id": "a",
                "model_a": "x",
                "model_b": "y",
                "winner": "model_a",
                "judge": "arena_user_1",
                "conversation_a": CHAT,
                "conversation_b": WORSE,
                "turn": 1,
                "anony": True,
            }
        ],
    ),
    "lmsys/mt_bench_human_judgments": (
        "arena",
        [
            {
                "winner": "model_b",
                "conversation_a": [*WORSE, USER, BOT],
                "conversation_b": [*CHAT, USER, BAD],
                "turn": 1,
            }
        ],
    ),
    "lmarena-ai/arena-human-preference-140k": (
        "arena",
        [
            {
                "winner": "model_a",
                "conversation_a": [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in CHAT],
                "conversation_b": [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in WORSE],
            }
        ],
    ),
    "lmarena-ai/arena-human-preference-55k": (
        "arena",
        [
            {
                "prompt": '["Hi"]',
                "response_a": '["What?"]',
                "response_b": '["Hello"]',
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            }
        ],
    ),
    "OpenAssistant/oasst2": ("oasst", [TREE]),
}
REFUSED: dict[str, dict[str, Any]] = {
    "openbmb/UltraFeedback": {"source": "x", "instruction": "Hi", "models": ["a"], "completions": [{"response": "x"}]},
    "meta-math/MetaMathQA": {"type": "x", "query": "Hi", "original_question": "Hi", "response": "Hello"},
    "AI-MO/NuminaMath-1.5": {"problem": "Hi", "solution": "Hello", "answer": "1", "problem_type": "Algebra"},
    "nvidia/OpenMathInstruct-2": {"problem": "Hi", "generated_solution": "x", "expected_answer": "1"},
    "nvidia/Llama-Nemotron-Post-Training-Dataset": {"input": [USER], "output": "Hello", "category": "chat"},
    "m-a-p/CodeFeedback-Filtered-Instruction": {"query": "Hi", "answer": "Hello", "resource": "x", "lang": "python"},
    "ise-uiuc/Magicoder-OSS-Instruct-75K": {"lang": "python", "problem": "Hi", "solution": "x"},
    "openai/prm800k": {"question": {"problem": "Hi"}, "label": {"steps": [], "finish_reason": "solution"}},
    "trl-lib/prm800k": {"prompt": "Hi", "completions": ["a", "b"], "labels": [True, False]},
    "openai/webgpt_comparisons": {"question": {"full_text": "Hi"}, "answer_0": "x", "score_0": 1.0, "answer_1": "y"},
    "openai/summarize_from_feedback": {"info": {"post": "Hi"}, "summaries": [{"text": "x"}], "choice": 1},
    "OpenAssistant/oasst1 messages": {"message_id": "a", "parent_id": None, "text": "Hi", "role": "prompter"},
}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_a_data_set_are_recognized(name: str, tmp_path: Path) -> None:
    layout, row = EXAMPLES[name]
    path = write(tmp_path / "a.jsonl", row)
    loaded = load([path])
    assert (loaded.kind, loaded.layout) == ("examples", layout)
    (record,) = loaded.records
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
    assert record["messages"][0]["content"] == "Hi"
    assert record["messages"][1]["content"] == "Hello" or record["messages"][1]["tool_calls"]
    assert check_paths([path])["format"] == layout
    (given,) = init_data.read([path])
    assert (given.kind, given.layout) == ("examples", layout)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_a_data_set_are_recognized(name: str, tmp_path: Path) -> None:
    layout, rows = PAIRS[name]
    path = write(tmp_path / "a.jsonl", *rows)
    if layout == "oasst":  # a tree is both, and read as examples unless it is listed as preferences
        assert load([path]).kind == "examples"
        path_layout = "dpo"
    else:
        path_layout = "auto"
        (given,) = init_data.read([path])
        assert (given.kind, given.layout) == ("preferences", layout)
    loaded = load([path], path_layout)
    assert (loaded.kind, loaded.layout) == ("preferences", layout)
    (pair,) = loaded.records
    prompt, chosen = pair["messages"][: pair["asked"]], pair["messages"][pair["asked"] :]
    texts = [[message["content"].strip() for message in side] for side in (prompt, chosen, pair["rejected"])]
    assert texts == [["Hi"], ["Hello"], ["What?"]], pair["meta"]


@pytest.mark.parametrize("name", REFUSED)
def test_other_data_sets_are_refused_with_their_columns(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", REFUSED[name])
    for read in (lambda: check_paths([path]), lambda: init_data.read([path])):
        with pytest.raises(InputError, match="unknown format") as caught:
            read()
        assert all(column in caught.value.what for column in REFUSED[name])


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_a_tie_of_the_arena_has_no_margin(winner: str, tmp_path: Path) -> None:
    (pair,) = load(
        [write(tmp_path / "a.jsonl", {"conversation_a": CHAT, "conversation_b": WORSE, "winner": winner})]
    ).records
    assert pair["margin"] == 0.0


def test_messages_after_the_judged_turns_of_the_arena_are_ignored_fields(tmp_path: Path) -> None:
    later = [{**USER, "name": "x"}, {**BOT, "mood": "glad", "note": None}]
    row = {"conversation_a": [*CHAT, *later], "conversation_b": [*WORSE, USER], "winner": "model_a", "turn": 1}
    loaded = load([write(tmp_path / "a.jsonl", row)])
    (pair,) = loaded.records
    texts = [message["content"].strip() for message in [*pair["messages"], *pair["rejected"]]]
    assert texts == ["Hi", "Hello", "What?"]
    assert [*pair["ignored"]] == [
        f"conversation_{side}[].{name} (later turns)"
        for side, names in (("a", ("role", "content", "name", "mood")), ("b", ("role", "content")))
        for name in names
    ]
    assert taken(loaded.records) == {
        "used": {
            "conversation_a": 1, "conversation_b": 1, "turn": 1, "winner": 1,
            "conversation_a[].content": 2, "conversation_a[].role": 2,
            "conversation_b[].content": 2, "conversation_b[].role": 2,
        },
        "ignored": {
            "conversation_a[].content (later turns)": 2, "conversation_a[].role (later turns)": 2,
            "conversation_a[].name (later turns)": 1, "conversation_a[].mood (later turns)": 1,
            "conversation_a[].note (later turns)": 1,
            "conversation_b[].content (later turns)": 1, "conversation_b[].role (later turns)": 1,
        },
    }  # fmt: skip


@pytest.mark.parametrize("turn", [1, 1.0, "1"])
def test_the_number_of_judged_turns_may_be_text_or_a_float(turn: Any, tmp_path: Path) -> None:
    row = {"conversation_a": [*CHAT, USER, BOT], "conversation_b": [*WORSE, USER, BAD], "winner": "model_a"}
    (pair,) = load([write(tmp_path / "a.jsonl", {**row, "turn": turn})]).records
    assert [len(pair["messages"]), len(pair["rejected"])] == [2, 1]
    for all_turns in (None, "", 2, 7):
        (pair,) = load([write(tmp_path / "a.jsonl", {**row, "turn": all_turns})]).records
        assert [len(pair["messages"]), len(pair["rejected"])] == [4, 3] and "ignored" not in pair


@pytest.mark.parametrize("turn", [0, -1, 1.5, "first", True, [1]])
def test_another_number_of_judged_turns_is_malformed(turn: Any, tmp_path: Path) -> None:
    row = {"conversation_a": CHAT, "conversation_b": WORSE, "winner": "model_a", "turn": turn}
    (pair,) = load([write(tmp_path / "a.jsonl", row)]).records
    assert "problem" in pair["meta"] and not pair["messages"]


def test_another_winner_is_malformed(tmp_path: Path) -> None:
    row = {"conversation_a": CHAT, "conversation_b": WORSE, "winner": "gpt-4"}
    (pair,) = load([write(tmp_path / "a.jsonl", row)]).records
    assert "winner must be model_a, model_b, tie, tie (bothbad), both_bad, found gpt-4" in pair["meta"]


def test_each_lower_ranked_answer_of_nectar_is_a_pair_with_the_distance_in_ranks(tmp_path: Path) -> None:
    answers = [{"answer": str(rank), "model": "m", "rank": rank} for rank in (3.0, 1.0, 2.0, 1.0)]
    row = {"prompt": HUMAN, "answers": answers, "num_responses": 4}
    found = load([write(tmp_path / "a.jsonl", row)]).records
    assert [(one["messages"][-1]["content"], one["rejected"][0]["content"], one["margin"]) for one in found] == [
        ("1.0", "2.0", 1.0),
        ("1.0", "3.0", 2.0),
    ]


def test_the_strength_of_a_preference_is_the_margin_and_a_tie_has_none(tmp_path: Path) -> None:
    rows = [
        {"context": [USER], "response1": "Hello", "response2": "What?", "overall_preference": strength}
        for strength in (-3, 0, 2)
    ]
    found = load([write(tmp_path / "a.jsonl", *rows)]).records
    assert [(one["messages"][-1]["content"], one["margin"]) for one in found] == [
        ("Hello", 3.0),
        ("Hello", 0.0),
        ("What?", 2.0),
    ]


CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": '{"x": 1}', "status": "done"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "2"}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Two", "annotations": []}],
}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Add."}]}


def test_a_log_of_the_responses_api_has_calls_results_and_traces(tmp_path: Path) -> None:
    row = {
        "instructions": "Add.",
        "input": [{"role": "user", "content": "1 + 1?"}, CALL, RESULT],
        "output": [THOUGHT, SAID],
        "tools": [
            {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": True}
        ],
        "model": "gpt-5",
    }
    (record,) = load([write(tmp_path / "a.jsonl", row)]).records
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
    assert record["messages"] == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Two", "reasoning_content": "Add."},
    ]
    assert record["tools"][0]["function"]["name"] == "f"
    assert json.loads(record["meta"]) == {"model": "gpt-5"}
    assert "output[].summary" not in record["ignored"], "an empty summary says nothing"
    part = {"type": "reasoning_text", "text": "Add.", "signature": "x", "annotations": []}
    thought = {**THOUGHT, "content": [part]}
    result = {**RESULT, "output": [{"type": "input_text", "text": "2", "cached": True}]}
    asked = [*row["input"][:2], result]
    (record,) = load([write(tmp_path / "b.jsonl", {**row, "input": asked, "output": [thought, SAID]})]).records
    assert record["messages"][3]["content"] == "2"
    assert [name for name in record["ignored"] if "[].content[]" in name] == [
        "input[].content[].cached",
        "output[].content[].signature",
    ]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"previous_response_id": "resp_0"}, "only the end of a conversation"),
        ({"output": [{"type": "web_search_call", "id": "ws_1"}]}, "items of type web_search_call"),
        ({"output": [SAID, THOUGHT]}, "reasoning that no message of the assistant follows"),
        ({"output": [THOUGHT, {**SAID, "reasoning_content": "Guess."}]}, "two different traces of reasoning"),
    ],
)
def test_a_log_that_is_not_the_whole_conversation_in_text_is_malformed(
    more: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    (record,) = load([write(tmp_path / "a.jsonl", {"input": "Hi", "output": [SAID], **more})]).records
    assert not record["messages"] and problem in record["meta"]


def test_parallel_calls_of_a_log_are_one_message_with_the_trace_before_them(tmp_path: Path) -> None:
    calls = [CALL, {**CALL, "call_id": "c2"}]
    asked = [{"role": "user", "content": "1 + 1?"}, THOUGHT, *calls, RESULT, {**RESULT, "call_id": "c2"}]
    (record,) = load([write(tmp_path / "a.jsonl", {"input": asked, "output": [SAID]})]).records
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "tool", "tool", "assistant"]
    calling = record["messages"][1]
    assert (calling["reasoning_content"], [call["id"] for call in calling["tool_calls"]]) == ("Add.", ["c1", "c2"])
    asked[3:3] = [THOUGHT]  # between the calls
    (record,) = load([write(tmp_path / "b.jsonl", {"input": asked, "output": [SAID]})]).records
    assert [len(message.get("tool_calls", ())) for message in record["messages"][:3]] == [0, 1, 1]


def test_calls_of_a_log_are_in_one_message_with_the_text_before_them(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "1 + 1?"}, THOUGHT, SAID, CALL, {**CALL, "call_id": "c2"}, RESULT]
    (record,) = load([write(tmp_path / "a.jsonl", {"input": asked, "output": [SAID]})]).records
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "tool", "assistant"]
    calling = record["messages"][1]
    assert (calling["content"], calling["reasoning_content"]) == ("Two", "Add.")
    assert [call["id"] for call in calling["tool_calls"]] == ["c1", "c2"]


def test_parallel_calls_of_turns_are_one_message_with_the_trace_of_the_first(tmp_path: Path) -> None:
    calls = [{"from": "function_call", "value": f'{{"name": "{name}", "arguments": {{}}}}'} for name in "fg"]
    calls[0]["reasoning_content"] = "Add."
    turns = [{"from": "human", "value": "1 + 1?"}, *calls, {"from": "observation", "value": "2"}]
    (record,) = load(
        [write(tmp_path / "a.jsonl", {"conversations": [*turns, {"from": "gpt", "value": "Two"}]})]
    ).records
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "tool", "assistant"]
    calling = record["messages"][1]
    assert calling["reasoning_content"] == "Add."
    assert [call["function"]["name"] for call in calling["tool_calls"]] == ["f", "g"]


@pytest.mark.parametrize(
    ("first", "second", "messages"),
    [
        ({}, {}, 1),
        ({"reasoning_content": "Add."}, {}, 1),
        ({}, {"reasoning_content": "Add."}, 2),
        ({"weight": 0.0}, {}, 2),
        ({"weight": 0.0}, {"weight": 0.0}, 1),
        ({"name": "a"}, {"name": "b"}, 2),
    ],
)
def test_consecutive_calls_are_joined_by_one_rule_in_turns_and_in_a_log(
    first: dict[str, Any], second: dict[str, Any], messages: int
) -> None:
    call = {"type": "function", "id": "c", "function": {"name": "f", "arguments": {}}}
    one, other = ({"role": "assistant", "content": "", "tool_calls": [call], **more} for more in (first, second))
    expected = [one, other] if messages == 2 else [{**one, "tool_calls": [call, call]}]
    assert joined_calls([one, other]) == answered([{"messages": [one]}, {"messages": [other]}]) == expected


@pytest.mark.parametrize(("key", "kinds"), [("conversation", 3), ("conversations", 2)])
def test_turns_of_several_forms_in_a_table_are_read_as_in_a_file_of_lines(key: str, kinds: int, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    forms = [
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        CHAT,
        [{"input": "Hi", "output": "Hello"}],
    ]
    rows = [{key: turns} for turns in forms[:kinds]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    of_table = load([str(tmp_path / "a.parquet")]).records
    of_lines = load([write(tmp_path / "a.jsonl", *rows)]).records
    assert [record["messages"] for record in of_table] == [record["messages"] for record in of_lines]
    assert all(len(record["messages"]) == 2 for record in of_table)


def test_texts_under_input_and_output_are_no_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown format"):
        load([write(tmp_path / "a.jsonl", {"input": "Hi", "output": "Hello"})])


def test_a_system_prompt_next_to_judged_messages_is_that_of_the_prompt(tmp_path: Path) -> None:
    rows = [{"system": "Be brief.", "messages": chat, "label": chat is CHAT} for chat in (CHAT, WORSE)]
    (pair,) = load([write(tmp_path / "a.jsonl", *rows)]).records
    assert pair["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "system" not in pair["meta"]
    rows = [{**row, "messages": [{"role": "system", "content": "Other."}, *row["messages"]]} for row in rows]
    assert all(
        "`system` is not the system prompt" in one["meta"] for one in load([write(tmp_path / "b.jsonl", *rows)]).records
    )
