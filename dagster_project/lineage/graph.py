"""Walks over what was made from what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def closure(start: Iterable[T], following: Callable[[T], Iterable[T]]) -> dict[T, None]:
    """Some items and all that can be reached from them, each once."""
    found: dict[T, None] = {}
    pending = [*start]
    while pending:
        one = pending.pop()
        if one not in found:
            found[one] = None
            pending += following(one)
    return found


def flow_order(last: Iterable[T], before: Callable[[T], Iterable[T]]) -> list[T]:
    """Some items and all that comes before them, each once and after what comes before it."""
    order: list[T] = []
    visited: set[T] = set()

    def visit(one: T) -> None:
        if one not in visited:
            visited.add(one)
            for other in before(one):
                visit(other)
            order.append(one)

    for one in last:
        visit(one)
    return order
