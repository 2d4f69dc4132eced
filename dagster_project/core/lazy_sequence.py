"""Sequences whose items are computed when they are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """Base of sequences that need not have their items in memory. Their slices are lists."""

    @abstractmethod
    def _item(self, index: int) -> T:
        """Args:
        index: from 0.
        """

    def _items(self, indices: range) -> Iterable[T]:
        return map(self._item, indices)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        at = range(len(self))[index]
        return [*self._items(at)] if isinstance(at, range) else self._item(at)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items(range(len(self))))
