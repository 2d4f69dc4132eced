"""Which layout the rows of a file have, by their keys, and which split a file belongs to, by its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from dagster_project.core.errors import InputError
from dagster_project.curation.sources.files import Row
from dagster_project.curation.sources.layouts import LAYOUTS, Layout
from dagster_project.curation.sources.pair_layouts import PAIR_LAYOUTS, PairLayout, is_boolean, is_transcript, judgement

L = TypeVar("L", "Layout", "PairLayout")


class Shape(NamedTuple):
    """What detection uses of a row."""

    keys: tuple[str, ...]
    null: tuple[str, ...]
    """Keys of pair layouts whose value is null."""
    judged: tuple[str, ...]
    """Keys of a judgement whose value is true or false."""
    numbers: tuple[tuple[str, bool | None], ...]
    """Keys of a judgement with another value: true for 1, false for 0, None for any other. Missing values are not among
    them."""
    only: str = ""
    """The only layout that the row can have by its values (`shown_by_values`)."""


Shapes = Counter[Shape]
"""Number of rows of each shape, in the order in which the shapes first occur. Rows without a value are not counted."""


def shapes_of(rows: Iterable[Row]) -> Shapes:
    return Counter(_shape(tuple(row.value), row.value) for row in rows if row.value is not None)


def _shape(keys: tuple[str, ...], row: Mapping[str, Any]) -> Shape:
    nullable, judging = _looked_at(keys)
    null = tuple([key for key in nullable if row[key] is None])
    judged = tuple([key for key in judging if is_boolean(row[key])])
    others = [key for key in judging if key not in judged and row[key] not in (None, "")]
    return Shape(keys, null, judged, tuple([(key, judgement(row[key])) for key in others]), shown_by_values(row))


def shown_by_values(row: Mapping[str, Any]) -> str:
    """The only layout that a row can have by its values; empty if these show none.

    {"chosen": "\\n\\nHuman: Hi...", "rejected": "\\n\\nHuman: Hi...", "instruction": "Rate it."}  ->  transcripts
    """
    answers = row.get("chosen"), row.get("rejected")
    if isinstance(answers[0], str) and isinstance(answers[1], str):
        if all(map(is_transcript, answers)):
            return "transcripts"
        has_prompt = not row.keys().isdisjoint({"prompt", "instruction", "messages", "conversations"})
        return "" if has_prompt or row.keys().isdisjoint({"question", "input"}) else "orca_dpo"
    items = row.get("output")
    if "input" in row and isinstance(items, list) and all(isinstance(item, dict) for item in items):
        return "responses" if any("type" in item or "role" in item for item in items) else ""
    return ""


def _looked_at(keys: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The keys of a row whose value can matter, as in a table of examples and pairs: of pair layouts, of judgements."""
    return [key for key in keys if key in _PAIR_KEYS], [key for key in keys if key in _JUDGEMENTS]


_PAIR_KEYS = frozenset(key for layout in PAIR_LAYOUTS.values() for form in layout.forms for key in form.keys)
_JUDGEMENTS = frozenset(form.judged for layout in PAIR_LAYOUTS.values() for form in layout.forms if form.judged)


def _counted(rows: Iterable[Row] | Shapes) -> Shapes:
    return rows if isinstance(rows, Counter) else shapes_of(rows)


def detect(
    rows: Sequence[Row] | Shapes, name: str, layouts: Mapping[str, Layout] | Mapping[str, PairLayout] = LAYOUTS
) -> str:
    """The layout whose keys most rows have.

    Args:
        layouts: LAYOUTS or PAIR_LAYOUTS.
    Raises:
        InputError: no layout fits any row, or the rows are preferences where examples are expected, or vice versa.
    """
    shapes = _counted(rows)
    examples, pairs = _best(shapes, LAYOUTS), _best(shapes, PAIR_LAYOUTS, look=layouts is LAYOUTS)
    best = examples if layouts is LAYOUTS else pairs
    if layouts is LAYOUTS and _preferred(examples, pairs):
        hint = "list the file under raw_preferences"
        if examples.rows:
            hint += f"; to imitate all of it nevertheless, set format: {examples.name}"
        keys = ", ".join(sorted(pairs.keys))
        raise InputError(f"{name}: the rows are preferences ({pairs.name}: {keys}), not examples to imitate", hint)
    if layouts is PAIR_LAYOUTS and examples.rows and not pairs.rows:
        keys = ", ".join(sorted(examples.keys))
        what = f"{name}: the rows are examples ({examples.name}: {keys}), not preferences"
        raise InputError(what, "list the file under raw_examples")
    if not best.rows:
        keys = ", ".join(_first_keys(shapes)) or "none"
        mapping = "{prompt: q, response: a}" if layouts is LAYOUTS else "{prompt: q, chosen: good, rejected: bad}"
        expected = "; ".join(f"{known}: {', '.join(sorted(layout.keys))}" for known, layout in layouts.items())
        raise InputError(
            f"{name}: unknown format (keys of the first row: {keys})",
            f"for other columns set a mapping, e.g. `mapping: {mapping}` in params.yaml or `pedigree check --mapping`;"
            f" known formats and their keys: {expected}",
        )
    return best.name


def _first_keys(shapes: Shapes) -> list[str]:
    """Keys of the first row that has a value."""
    return sorted(next(iter(shapes)).keys) if shapes else []


def is_known(rows: Sequence[Row]) -> bool:
    """Whether any row is in a layout of examples or of preferences."""
    shapes = shapes_of(rows)
    return bool(_best(shapes, LAYOUTS).rows or _best(shapes, PAIR_LAYOUTS).rows)


def kind(rows: Sequence[Row]) -> Literal["examples", "preferences"]:
    """Preferences if most rows have the keys of a pair layout that has more keys than any layout of examples.

    {"prompt", "completion"}                 ->  examples
    {"prompt", "completion", "label": true}  ->  preferences (KTO), since the other half should not be imitated
    {"message_tree_id", "prompt"}            ->  examples, since a tree is both
    """
    shapes = shapes_of(rows)
    return "preferences" if _preferred(_best(shapes, LAYOUTS), _best(shapes, PAIR_LAYOUTS, look=True)) else "examples"


class _Fit(NamedTuple):
    """The layout that fits most rows."""

    name: str
    rows: int
    """How many rows it fits."""
    keys: frozenset[str]
    """The keys of the layout."""


def _preferred(examples: _Fit, pairs: _Fit) -> bool:
    return pairs.rows > examples.rows or (len(pairs.keys) > len(examples.keys) and 2 * pairs.rows > examples.rows)


def _best(shapes: Shapes, layouts: Mapping[str, L], look: bool = False) -> _Fit:
    """The layout that fits most rows; of several, the one with most keys.

    Args:
        look: require the values of a pair of rows that have the keys of a pair layout.
    """
    fits = []
    numbers: dict[str, set[bool | None]] = {}
    for shape in shapes:
        for key, number in shape.numbers:
            numbers.setdefault(key, set()).add(number)
    binary = {key for key, found in numbers.items() if found == {False, True}}
    for name, layout in layouts.items():
        forms = {keys: _forms(layout, keys) for keys in dict.fromkeys(shape.keys for shape in shapes)}
        counts: Counter[frozenset[str]] = Counter()
        for shape, rows in shapes.items():
            if shape.only != name and (shape.only or layout.by_value):
                continue
            fitting = (form for form in forms[shape.keys] if not look or _is_pair(shape, form, binary))
            if form := next(fitting, None):
                counts[form.keys] += rows
        keys = max(counts, key=lambda keys: (counts[keys], len(keys)), default=layout.keys)
        fits.append(_Fit(name, counts.total(), keys))
    return max(fits, key=lambda fit: (fit.rows, len(fit.keys)))


def _forms(layout: Layout | PairLayout, shape: Sequence[str]) -> Sequence[Layout | PairLayout]:
    """The variants of a layout whose keys a row has."""
    if isinstance(layout, PairLayout):
        return [form for form in layout.forms if form.keys <= set(shape)]
    if layout.labels and any(_forms(other, shape) for other in _OTHERS if not other.by_value):
        return []
    return [layout] if (layout.keys == set(shape) if layout.alone else layout.keys <= set(shape)) else []


_OTHERS: list[Layout | PairLayout] = [
    *(
        layout
        for name, layout in LAYOUTS.items()
        if not layout.labels and name not in {"conversation", "gemini", "responses"}
    ),
    *PAIR_LAYOUTS.values(),
]
"""Layouts that take precedence over classification, e.g. KTO, whose rows also have a `label`."""


def _is_pair(shape: Shape, form: Layout | PairLayout, binary: Collection[str]) -> bool:
    """Whether a row is a pair. In a table with both kinds every row has all columns, some of them null.

    Args:
        binary: keys of a judgement whose numbers in the file are 0 and 1.
    """
    if not form.keys.isdisjoint(shape.null):
        return False
    if not isinstance(form, PairLayout) or not form.judged or form.judged in shape.judged:
        return True
    return form.judged_by_number and form.judged in binary and any(key == form.judged for key, _ in shape.numbers)


def choose(shapes: Shapes, name: str, layout: str, layouts: Mapping[str, L], mapped: L | None) -> tuple[str, L]:
    """The layout of a file by its name, by its keys (`auto`), or custom (`mapped`).

    Raises:
        InputError: no such layout, or no row has its keys.
    """
    if mapped is None:
        if layout != "auto" and layout not in layouts:
            raise InputError(f"{name}: unknown format {layout!r}", f"known formats: auto, {', '.join(layouts)}")
        layout = detect(shapes, name, layouts) if layout == "auto" else layout
        return layout, layouts[layout]
    if layout != "auto":
        raise InputError(f"{name}: both a format ({layout}) and a mapping", "leave one of them out")
    if not any(mapped.keys <= set(shape.keys) for shape in shapes):
        what = f"{name}: mapping: no row has the columns {', '.join(sorted(mapped.keys))}"
        raise InputError(what, f"columns of the first row: {', '.join(_first_keys(shapes)) or 'none'}")
    return "mapping", mapped


SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")
"""Spelling of a split -> canonical name."""


def canonical_split(label: Any) -> str | None:
    """ "Dev"  ->  "validation"; None if it is not a split name."""
    return SPLITS.get(label.strip().lower()) if isinstance(label, str) else None


def split_of_file(path: str) -> str | None:
    """The split in the name of a file: "a/val.jsonl.gz", "a/validation-00000-of-00002.parquet"  ->  "validation".

    On the Hub, older files also have a hash: "validation-00000-of-00001-a09b74b3ef9c3b56.parquet". `datasets` saves a
    split in a folder of this name: "a/test/data-00000-of-00001.arrow"  ->  "test".
    """
    folder, _, name = path.rpartition("/")
    if re.fullmatch(r"data-\d+-of-\d+\.arrow|dataset\.arrow", name):
        return canonical_split(folder.rpartition("/")[2])
    return canonical_split(re.sub(r"-\d+-of-\d+(-[0-9a-f]{16})?$", "", name.split(".")[0]))
