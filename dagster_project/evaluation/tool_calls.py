"""Measures of tool calls: whether they fit the tools, and whether they equal those of the reference."""

from __future__ import annotations

from collections import Counter

from dagster_project.core.messages import Tools
from dagster_project.core.tool_schemas import call_problem, counted
from dagster_project.training.inference.answers import Answer


def is_valid(answer: Answer, tools: Tools) -> bool:
    """Whether an answer has calls, and each one names a tool and has arguments that fit its JSON Schema."""
    return bool(answer.calls) and all(call_problem(call, tools) is None for call in answer.calls)


def same_names(reference: Answer, answer: Answer) -> bool:
    """Whether an answer calls the same tools, each as often, in any order."""
    return Counter(call.name for call in reference.calls) == Counter(call.name for call in answer.calls)


def same_calls(reference: Answer, answer: Answer) -> bool:
    """Whether an answer makes the same calls with equal arguments, in any order."""
    return counted(reference.calls) == counted(answer.calls)
