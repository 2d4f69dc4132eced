"""`make docs`: writes dagster_project/params.schema.json, docs/parameters.md and the tables of docs/checks.md from the
code, and the files of the package that repeat others: dvc.yaml, and the changes in results.

The JSON Schema comes from the classes that validate params.yaml, the tables of parameters come from the schema.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, create_model
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import core_schema

from dagster_project.commands.upgrade import RESULTS
from dagster_project.core.params import Section
from dagster_project.curation.checks.checks import CHECKS, Rules
from dagster_project.curation.checks.row_checks import ROW_CHECKS
from dagster_project.curation.sources.declarations import Declared
from dagster_project.lineage.code_lock import TEMPLATE
from dagster_project.lineage.export.tables import table
from dagster_project.optional_stages import OPTIONAL
from dagster_project.pipeline import PEDIGREE, STAGES, UNREAD, VARIANTS_OF, sections
from dagster_project.training.methods.options import OWN
from dagster_project.training.trainers.alignment.preference import METHODS
from dagster_project.training.trainers.harness.params import AUTO, OrAuto

Schema = dict[str, Any]

METHOD_KEYS: dict[str, tuple[str, Mapping[str, type[Section]]]] = {
    "adapter": ("peft", OWN),
    "aligned": ("options", METHODS),
}
"""Section -> the key whose content depends on `method`, and its class by
method. Other methods of `adapter` accept PEFT's keys."""

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def main() -> None:
    """Write every generated file."""
    for path, text in generated(Path()).items():
        path.write_text(text, encoding="utf-8")


def generated(root: Path) -> dict[Path, str]:
    """Every generated file -> its content. In docs/checks.md only the text between markers is generated."""
    schema = params_schema()
    checks = root / "docs" / "checks.md"
    return {
        root / "dagster_project" / "params.schema.json": json.dumps(schema, indent=1, ensure_ascii=False) + "\n",
        root / "docs" / "parameters.md": parameters_page(schema),
        checks: _fill(checks.read_text(encoding="utf-8"), check_tables()),
        root / "dagster_project" / TEMPLATE.name: (root / "dvc.yaml").read_text(encoding="utf-8"),
        root / "dagster_project" / RESULTS.name: results_of((root / "CHANGELOG.md").read_text(encoding="utf-8")),
    }


def results_of(changelog: str) -> str:
    """The headings of versions and the entries under "Results" of a changelog."""
    parts = re.split(r"^(?=##+ )", changelog, flags=re.MULTILINE)
    kept = [
        part if part.startswith("### Results") else part.splitlines()[0] + "\n"
        for part in parts
        if part.startswith(("## ", "### Results"))
    ]
    return "".join(part.removeprefix("### Results\n").rstrip("\n") + "\n\n" for part in kept).rstrip("\n") + "\n"


# ---- JSON Schema of params.yaml --------------------------------------------------------------------------------------


class _Generator(GenerateJsonSchema):
    """Adds the value `auto` to fields whose validator accepts it. Omits titles, which repeat the names of fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def function_wrap_schema(self, schema: core_schema.WrapValidatorFunctionSchema) -> Schema:
        accepted = super().function_wrap_schema(schema)
        return {"anyOf": [accepted, {"const": AUTO}]} if schema["function"]["function"] is OrAuto.func else accepted


def params_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of params.yaml, for editors."""
    sections()
    _describe_fields()
    fields: dict[str, Any] = {}
    for name, model in sections().items():
        optional = not any(field.is_required() for field in model.model_fields.values())
        one = model | None if optional else model
        fields[name] = (dict[str, model] if name in VARIANTS_OF.values() else one, None if name in UNREAD else ...)  # type: ignore[valid-type]
    whole = create_model("params", __base__=Section, **fields)
    models: list[type[BaseModel]] = [whole, *OWN.values(), *METHODS.values()]
    _, document = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)], schema_generator=_Generator
    )
    definitions = json.loads(_short_names(json.dumps(document["$defs"])))
    for definition in definitions.values():
        definition.pop("title")  # the name of the class
    root = definitions.pop("params")
    root["required"] = [name for name in root["required"] if name not in OPTIONAL]
    for name in VARIANTS_OF.values():
        root["properties"][name]["propertyNames"] = {"pattern": r"^[\w-]+$"}
    root["properties"]["adapter"]["minProperties"] = 1
    for model in sections().values():
        _inherited_last(model, definitions[_name_of(model, definitions)])
    for name in {_name_of(model, definitions) for model in _subclasses(Declared)} & definitions.keys():
        keys = definitions[name]["properties"]
        definitions[name]["properties"] = {
            key: keys[key] for key in sorted(keys, key=lambda key: key in Declared.model_fields)
        }
    for name, (key, by_method) in METHOD_KEYS.items():
        _definition(root["properties"][name]["additionalProperties"], definitions)["allOf"] = [
            {
                "if": {"properties": {"method": {"const": method}}, "required": ["method"]},
                "then": {"properties": {key: {"$ref": f"#/$defs/{_name_of(model, definitions)}"}}},
            }
            for method, model in by_method.items()
        ]
    return _join_lines(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **root,
            "title": "params.yaml",
            "description": "Parameters of the pipeline, a section per stage. Generated by `make docs`.",
            "$defs": dict(sorted(definitions.items())),
        }
    )


@cache
def _describe_fields() -> None:
    """Give the fields of all sections the docstrings beneath them as
    descriptions, also where a section contains another one."""
    models = [model for model in _subclasses(Section) if model.__module__.startswith("dagster_project.")]
    for model in models:
        written = {
            name: text
            for base in reversed(model.__mro__)
            if issubclass(base, Section)
            for name, text in _docstrings(base).items()
        }
        for name, field in model.model_fields.items():
            field.description = field.description or written.get(name)
    for _ in range(3):  # a schema contains copies of those of inner sections, which are at most two levels deep
        for model in models:
            model.model_rebuild(force=True)


def _subclasses(model: type[Section]) -> Iterator[type[Section]]:
    for child in model.__subclasses__():
        yield child
        yield from _subclasses(child)


@cache
def _docstrings(model: type[Section]) -> dict[str, str]:
    """Field of a class -> the docstring beneath it."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(definition.body)  # type: ignore[attr-defined]
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip


def _short_names(text: str) -> str:
    """Shorten the names that pydantic makes unique by their module:
    dagster_project__stages__splits__Params -> splits.Params"""
    return re.sub(r'dagster_project__[^"/]+', lambda match: ".".join(match[0].split("__")[-2:]), text)


def _name_of(model: type[Section], definitions: Schema) -> str:
    """Name of a class in `$defs`: with its module if another class has the same name."""
    long = f"{model.__module__.rpartition('.')[2]}.{model.__name__}"
    return long if long in definitions else model.__name__


def _inherited_last(model: type[Section], definition: Schema) -> None:
    """Move the inherited fields of a class to the end."""
    inherited = {
        field.alias or name
        for base in model.__bases__
        if issubclass(base, Section)
        for name, field in base.model_fields.items()
    }
    keys = definition["properties"]
    definition["properties"] = {key: keys[key] for key in sorted(keys, key=lambda key: key in inherited)}


def _join_lines(value: Any) -> Any:
    """Join the lines of each description."""
    if isinstance(value, list):
        return [_join_lines(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: " ".join(one.split()) if key == "description" and isinstance(one, str) else _join_lines(one)
        for key, one in value.items()
    }


def _definition(schema: Schema, definitions: Schema) -> Schema:
    definition: Schema = definitions[schema["$ref"].removeprefix("#/$defs/")]
    return definition


# ---- docs/parameters.md ----------------------------------------------------------------------------------------------


def parameters_page(schema: Schema) -> str:
    """A table per section, in flow order."""
    definitions = schema["$defs"]
    parts = [
        "# Parameters",
        (
            "Every key of `params.yaml`. Unknown keys and wrong types are refused before anything runs."
            " Each section belongs to one stage, except `compute` and `evaluation`,"
            " which several stages read, and `execution` and `provider`, which no stage reads. This page is generated"
            " from the code by `make docs`; `dagster_project/params.schema.json` has the same content, for editors."
        ),
    ]
    for name, section in schema["properties"].items():
        model = next(_models(section, definitions))
        parts += [f"## {name}", _linked(model["description"]), _table(model, definitions)]
        key, by_method = METHOD_KEYS.get(name, ("", {}))
        for title, options in _by_model(by_method).items():
            if options.model_fields:
                parts += [f"`{key}` of {title}:", _table(definitions[_name_of(options, definitions)], definitions)]
    return "\n\n".join(parts) + "\n"


def _by_model(by_method: Mapping[str, type[Section]]) -> dict[str, type[Section]]:
    """Methods, grouped by equal keys, with their class, e.g. "`rloo`, `grpo`" -> class."""
    groups: dict[str, dict[str, type[Section]]] = {}
    for method, model in by_method.items():
        groups.setdefault(str(model.model_json_schema().get("properties")), {})[method] = model
    return {", ".join(f"`{method}`" for method in group): next(iter(group.values())) for group in groups.values()}


def _table(model: Schema, definitions: Schema) -> str:
    rows = [(f"`{key}`", *others) for key, *others in _rows(model, definitions, "")]
    return table(["key", "type", "default", "description"], rows)


def _rows(model: Schema, definitions: Schema, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """A row per key. The keys of a nested mapping follow it, e.g. `replay.share` or `sources[].path`."""
    for name, field in model["properties"].items():
        default = "required" if name in model.get("required", []) else _default_text(field["default"])
        yield prefix + name, _kind(field), default, _linked(field["description"]).replace("|", "\\|")
        for inner in _models(field, definitions):
            yield from _rows(inner, definitions, f"{prefix}{name}{'[]' if field.get('type') == 'array' else ''}.")


def _default_text(default: Any) -> str:
    return f"`{default}`" if default and isinstance(default, str) else f"`{json.dumps(default, ensure_ascii=False)}`"


def _models(schema: Schema, definitions: Schema) -> Iterator[Schema]:
    """The mappings with known keys in a value, including the value itself."""
    if "$ref" in schema:
        yield _definition(schema, definitions)
    contained = [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    for inner in (*schema.get("anyOf", []), *schema.get("oneOf", []), *contained):
        yield from _models(inner, definitions)


def _kind(schema: Schema) -> str:
    """A JSON Schema as text, e.g. {"type": "integer", "minimum": 1} -> integer ≥ 1"""
    if alternatives := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(dict.fromkeys(map(_kind, alternatives)))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    if "$ref" in schema or schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"mapping to {_kind(values)}" if isinstance(values, dict) else "mapping"
    limits = " and ".join(f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema)
    return " ".join(filter(None, [schema.get("format", schema.get("type", "")), limits]))


def _linked(text: str) -> str:
    return re.sub(r"\bdocs/([\w-]+)\.md", r"[\1](\1.md)", text)


# ---- tables of docs/checks.md ----------------------------------------------------------------------------------------


def check_tables() -> dict[str, str]:
    """Marker in docs/checks.md -> the table between its begin and end."""
    on_set = [name for name in CHECKS if name not in ROW_CHECKS]
    return {"on rows": _checks(list(ROW_CHECKS)), "on the set": _checks(on_set), "of later stages": _later_checks()}


def _checks(names: list[str]) -> str:
    rules = Rules()
    only = {None: "", "examples": "", "preferences": " (pairs)", "benchmark": " (benchmarks)"}
    rows = [
        (f"`{n}`{only[CHECKS[n].kind]}", CHECKS[n].description, rules.severity_of(n), rules.action(n)) for n in names
    ]
    return table(["check", "passes if", "severity", "default policy"], rows)


def _later_checks() -> str:
    rows = []
    for module in [one for one in dict.fromkeys(STAGES.values()) if one != "instructions"]:
        stages = ", ".join(f"`{stage}`" for stage, one in STAGES.items() if one == module)
        for name, description in PEDIGREE.check_descriptions(module).items():
            if module != "preferences" or description != CHECKS[name].description:  # the others are in the tables above
                rows.append((stages, f"`{name}`", description))
    return table(["stage", "check", "passes if"], rows)


def _fill(page: str, tables: Mapping[str, str]) -> str:
    for name, shown in tables.items():
        begin, end = f"<!-- checks {name}: begin (make docs) -->", f"<!-- checks {name}: end -->"
        before, after = page.split(begin)[0], page.split(end)[1]
        page = f"{before}{begin}\n{shown}\n{end}{after}"
    return page


if __name__ == "__main__":
    main()
