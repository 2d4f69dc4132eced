"""One row in each layout of a source file: instructions, preference pairs and benchmarks."""

from __future__ import annotations

from typing import Any

SYSTEM = ("system", "Be brief.")
LAYOUT_ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "alpaca": (
        {"system": "Be brief.", "instruction": "Name it.", "input": "A bird.", "output": "Wren"},
        [SYSTEM, ("user", "Name it.\n\nA bird."), ("assistant", "Wren")],
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    "sharegpt": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "conversation": (
        {"conversation": [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}], "turn": 1},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    "openorca": (
        {"id": "niv.1", "system_prompt": "Be brief.", "question": "Hi?", "response": "Hello"},
        [SYSTEM, ("user", "Hi?"), ("assistant", "Hello")],
    ),
    "responses": (
        {
            "instructions": "Be brief.",
            "input": [{"role": "user", "content": "Hi"}],
            "output": [
                {
                    "id": "msg_1",
                    "type": "message",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
                }
            ],
        },
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "Hi"}]},
                {"role": "model", "parts": [{"text": "Hel"}, {"text": "lo"}]},
            ],
        },
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "bedrock": (
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "Be brief."}],
            "messages": [
                {"role": "user", "content": [{"text": "Hi"}]},
                {"role": "assistant", "content": [{"text": "Hello"}]},
            ],
        },
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "anthropic": (
        {
            "system": "Be brief.",
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
            ],
        },
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "dolly": (
        {"instruction": "Name it.", "context": "A bird.", "response": "Wren"},
        [("user", "Name it.\n\nA bird."), ("assistant", "Wren")],
    ),
    "prompt_completion": (
        {"system": "Be brief.", "prompt": "Hi", "completion": "Hello"},
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "prompt_response": (
        {"system": "Be brief.", "prompt": "Hi", "response": "Hello"},
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "instances": (
        {"instruction": "Name it.", "instances": [{"input": "A bird.", "output": "Wren"}]},
        [("user", "Name it.\n\nA bird."), ("assistant", "Wren")],
    ),
    "question_answer": (
        {"system": "Be brief.", "question": "Hi?", "answer": "Hello"},
        [SYSTEM, ("user", "Hi?"), ("assistant", "Hello")],
    ),
    "flan": ({"inputs": "Hi", "targets": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
    "ultrachat": ({"id": "0", "data": ["Hi", "Hello"]}, [("user", "Hi"), ("assistant", "Hello")]),
    "xlam": (
        {
            "query": "Is it cold in Oslo?",
            "tools": (
                '[{"name": "weather", "description": "Weather.", "parameters": {"city": {"type": "str", "description":'
                ' "Place."}}}]'
            ),
            "answers": '[{"name": "weather", "arguments": {"city": "Oslo"}}]',
        },
        [("user", "Is it cold in Oslo?"), ("assistant", "")],
    ),
    "glaive": (
        {"system": "SYSTEM: Be brief.\n", "chat": "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>\n\n\n"},
        [SYSTEM, ("user", "Hi"), ("assistant", "Hello")],
    ),
    "oasst": (
        {
            "message_tree_id": "t",
            "prompt": {
                "role": "prompter",
                "text": "Hi",
                "replies": [
                    {"role": "assistant", "text": "What?", "rank": 1, "replies": []},
                    {
                        "role": "assistant",
                        "text": "Hello",
                        "rank": 0,
                        "replies": [{"role": "prompter", "text": "Bye", "replies": []}],
                    },
                ],
            },
        },
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    "classification": (
        {"system": "Be brief.", "text": "Great!", "label": 1, "label_text": "positive"},
        [SYSTEM, ("user", "Great!"), ("assistant", "positive")],
    ),
    "text": ({"text": "Wrens are small."}, [("assistant", "Wrens are small.")]),
}
PAIR = {"prompt": "Hi", "completion": "Hello"}
PAIR_ROWS: dict[str, list[dict[str, Any]]] = {
    "preference": [{"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "What?"},
        }
    ],
    "transcripts": [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}],
    "openai_dpo": [
        {
            "input": {"messages": [{"role": "user", "content": "Hi"}], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [{"role": "assistant", "content": "Hello"}],
            "non_preferred_output": [{"role": "assistant", "content": "What?"}],
        }
    ],
    "alpaca_dpo": [{"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "What?"}],
    "gemini": [
        {
            "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
            "completions": [
                {"score": 0, "completion": {"role": "model", "parts": [{"text": "What?"}]}},
                {"score": 1, "completion": {"role": "model", "parts": [{"text": "Hello"}]}},
            ],
        }
    ],
    "alpaca_eval": [{"instruction": "Hi", "output_1": "What?", "output_2": "Hello", "preference": 2}],
    "kto": [{**PAIR, "label": True}, {**PAIR, "completion": "What?", "label": False}],
    "oasst": [LAYOUT_ROWS["oasst"][0]],
    "orca_dpo": [{"question": "Hi", "chosen": "Hello", "rejected": "What?"}],
    "arena": [
        {
            "winner": "model_b",
            "conversation_a": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}],
            "conversation_b": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "turn": 1,
        }
    ],
    "helpsteer": [
        {
            "context": [{"role": "user", "content": "Hi"}],
            "response1": "Hello",
            "response2": "What?",
            "overall_preference": -2,
        }
    ],
    "nectar": [
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: ",
            "answers": [
                {"answer": "What?", "model": "a", "rank": 2.0},
                {"answer": "Hello", "model": "b", "rank": 1.0},
            ],
            "num_responses": 2,
        }
    ],
    "pku_saferlhf": [{"prompt": "Hi", "response_0": "What?", "response_1": "Hello", "better_response_id": 1}],
    "shp": [{"history": "Hi", "human_ref_A": "Hello", "human_ref_B": "What?", "labels": 1}],
}
"""One pair in each layout: Hello is better than What? as an answer to Hi."""
BENCHMARK_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    # layout: (row, question, right answer)
    "mmlu": (
        {"question": "Two and two?", "choices": ["three", "four"], "answer": 1, "subject": "sums"},
        "Two and two?",
        "four",
    ),
    "mmlu, by letter": (
        {"question": "Two and two?", "choices": ["three", "four"], "answer": "B"},
        "Two and two?",
        "four",
    ),
    "hellaswag": (
        {"ctx": "She lights the", "endings": ["sea.", "lamp."], "label": "1", "activity_label": "Home"},
        "She lights the",
        "lamp.",
    ),
    "mmlu, in columns": (
        {"question": "Two and two?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B", "subject": "sums"},
        "Two and two?",
        "4",
    ),
    "mmlu, in capitals": (
        {"Question": "Two and two?", "A": "3", "B": "4", "C": "5", "D": "6", "Answer": "B"},
        "Two and two?",
        "4",
    ),
    "mmlu_pro": (
        {
            "question": "Two and two?",
            "options": ["three", "four"],
            "answer": "B",
            "answer_index": 1,
            "category": "math",
        },
        "Two and two?",
        "four",
    ),
    "agieval": (
        {
            "passage": "There are two pairs.",
            "question": "How many?",
            "options": ["(A)three", "(B)four"],
            "label": "B",
            "answer": None,
            "other": None,
        },
        "There are two pairs.\n\nHow many?",
        "four",
    ),
    "agieval, several": (
        {"passage": None, "question": "Red?", "options": ["(A)rose", "(B)grass", "(C)fire"], "label": ["A", "C"]},
        "Red?",
        "rose\nfire",
    ),
    "agieval, in words": (
        {
            "passage": None,
            "question": "How many?",
            "options": None,
            "label": None,
            "answer": "30",
            "other": {"level": 4},
        },
        "How many?",
        "30",
    ),
    "ifeval": (
        {
            "key": 1000,
            "prompt": "Write without commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        },
        "Write without commas.",
        "",
    ),
    "arc": (
        {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
        "Hot?",
        "fire",
    ),
    "piqa": (
        {"goal": "Cut paper", "sol1": "Use scissors.", "sol2": "Use soup.", "label": 0},
        "Cut paper",
        "Use scissors.",
    ),
    "gsm8k": ({"question": "How many eggs?", "answer": "2 + 2 = 4\n#### 4"}, "How many eggs?", "2 + 2 = 4\n#### 4"),
}
