"""The licenses of a model's data and base model, most restrictive first, and those that do not go together. A reading aid, not legal advice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

UNKNOWN = "unknown"
PUBLIC_DOMAIN, PERMISSIVE, ATTRIBUTION, SHARE_ALIKE = "public domain", "permissive", "attribution", "share-alike"
NO_DERIVATIVES, NON_COMMERCIAL, OWN_TERMS = "no derivatives", "non-commercial", "own terms"
FAMILIES = {
    UNKNOWN: r"|unknown|other|none|noassertion",
    OWN_TERMS: r"proprietary|licenseref-.*|.*all rights reserved.*",
    NON_COMMERCIAL: r".*\bnc\b.*|.*non-?commercial.*|.*research[ -]only.*",
    NO_DERIVATIVES: r"cc-by-nd\b.*",
    SHARE_ALIKE: r"cc-by-sa\b.*|[al]?gpl(-.*)?|mpl-.*|odbl(-.*)?|cdla-sharing-.*|eupl-.*|epl-.*|cddl-.*|gfdl(-.*)?|osl-.*|cecill-2.*",
    ATTRIBUTION: r"cc-by(-\d.*)?|odc-by(-.*)?|ogl-.*|etalab-.*|dl-de-by-.*|nlod-.*",
    PUBLIC_DOMAIN: r"cc0(-.*)?|pddl(-.*)?|unlicense|0bsd|mit-0|cc-pddc|dl-de-zero-.*|public[ -]domain",
    PERMISSIVE: r"apache-.*|mit|bsd(-.*)?|isc|zlib|bsl-1\.0|cdla-permissive-.*|artistic-.*|afl-.*|ms-pl|ncsa|upl-1\.0|wtfpl|postgresql|python-2\.0|psf-.*",
}  # fmt: skip
"""Family -> names that belong to it, SPDX or as the Hugging Face Hub spells them. Any other name has terms of its own."""
ORDER = (UNKNOWN, OWN_TERMS, NON_COMMERCIAL, NO_DERIVATIVES, SHARE_ALIKE, ATTRIBUTION, PERMISSIVE, PUBLIC_DOMAIN)
"""The most restrictive family first: what is not known may be forbidden."""


def family(license: str) -> str:
    """The family of a license or of an SPDX expression: of `A OR B` the less restrictive one, of `A AND B`, or with parentheses, the more restrictive."""
    text = " ".join(license.split())
    nested = "(" in text and " OR " in f"{text} "
    choices = [text] if nested else re.split(r" OR ", text)
    parts = r" AND | OR |[()]" if nested else r" AND |[()]"
    ranks = [
        min(
            ORDER.index(_family_of_name(re.split(r" WITH ", part)[0].strip()))
            for part in re.split(parts, choice)
            if part.strip() or not text
        )
        for choice in choices
    ]
    return ORDER[max(ranks)]


def _family_of_name(name: str) -> str:
    return next((one for one, names in FAMILIES.items() if re.fullmatch(names, name, re.IGNORECASE)), OWN_TERMS)


def summarize_licenses(
    base_model: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]], teachers: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The licenses of everything that a model was made from.

    Returns:
        {"listed": [{"license", "family", "of": ["base model", "teacher FOLDER", source, ...]}, ...], most restrictive first; "problems": [sentence, ...]}
    """
    owners: dict[str, list[str]] = {}
    if base_model:
        owners[base_model.get("license") or UNKNOWN] = ["base model"]
    for teacher in teachers:
        owners.setdefault(teacher["license"], []).append(f"teacher {teacher['folder']}")
    for path, source in sources.items():
        owners.setdefault(source.get("license") or UNKNOWN, []).append(path)
    ordered = sorted(owners, key=lambda license: (ORDER.index(family(license)), license.lower()))
    listed = [{"license": license, "family": family(license), "of": owners[license]} for license in ordered]
    return {"listed": listed, "problems": [*_single_problems(listed), *_paired_problems(listed)]}


def most_restrictive(summary: Mapping[str, Any]) -> str | None:
    """The first license of a summary of a model; None if neither data nor a base model is recorded."""
    return next((str(entry["license"]) for entry in summary["licenses"]["listed"]), None)


ALONE = {
    UNKNOWN: "is unknown: whether the model may be used or passed on cannot be told.",
    OWN_TERMS: "has terms of its own: read them before the model is used or passed on.",
    NO_DERIVATIVES: "does not allow adapted versions to be passed on, and the model may be one.",
}


NO_DERIVATIVES_EITHER = re.compile(r"\bnd\b", re.IGNORECASE)
"""In a name of the family `NON_COMMERCIAL`: it does not allow adapted versions to be passed on, either."""


def _single_problems(listed: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for entry in listed:
        both = entry["family"] == NON_COMMERCIAL and NO_DERIVATIVES_EITHER.search(entry["license"])
        why = NO_DERIVATIVES if both else entry["family"]
        lines += [f"The {_named(entry)} {ALONE[why]}"] if why in ALONE else []
    return lines


def _paired_problems(listed: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each pair of licenses that the model cannot satisfy both under one of them."""
    lines = []
    for one, other in combinations(listed, 2):
        families = one["family"], other["family"]
        if families[0] == NON_COMMERCIAL and families[1] in (SHARE_ALIKE, ATTRIBUTION, PERMISSIVE, PUBLIC_DOMAIN):
            keeps = " and requires that adapted versions do, too" if families[1] == SHARE_ALIKE else ""
            lines.append(f"Not compatible: the {_named(one)} forbids commercial use, the {_named(other)} allows it{keeps}.")
        elif families == (SHARE_ALIKE, SHARE_ALIKE) and one["license"].casefold() == other["license"].casefold():
            continue  # the same license: names of SPDX are equal in any case
        elif families == (SHARE_ALIKE, SHARE_ALIKE):
            lines.append(f"Not compatible: the {_named(one)} and the {_named(other)} each require adapted versions to keep that license.")
        elif families[0] == SHARE_ALIKE:
            lines.append(f"The {_named(one)} requires adapted versions to keep it: {other['license']} alone does not cover the model.")
    return lines


def _named(entry: Mapping[str, Any]) -> str:
    """ "license of a.jsonl and 2 more (MIT)"."""
    first, *more = entry["of"]
    return f"license of {first}{f' and {len(more)} more' if more else ''} ({entry['license']})"
