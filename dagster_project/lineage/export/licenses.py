"""The licenses of a model's data and base model, most restrictive first, and
those that do not go together. A reading aid, not legal advice."""

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
    SHARE_ALIKE: r"cc-by-sa\b.*|[al]?gpl(-.*)?|mpl-.*|odbl(-.*)?|cdla-sharing-.*|eupl-.*|epl-.*|cddl-.*|gfdl(-.*)?"
                 r"|osl-.*|cecill-2.*",
    ATTRIBUTION: r"cc-by(-\d.*)?|odc-by(-.*)?|ogl-.*|etalab-.*|dl-de-by-.*|nlod-.*",
    PUBLIC_DOMAIN: r"cc0(-.*)?|pddl(-.*)?|unlicense|0bsd|mit-0|cc-pddc|dl-de-zero-.*|public[ -]domain",
    PERMISSIVE: r"apache-.*|mit|bsd(-.*)?|isc|zlib|bsl-1\.0|cdla-permissive-.*|artistic-.*|afl-.*|ms-pl|ncsa|upl-1\.0"
                r"|wtfpl|postgresql|python-2\.0|psf-.*",
}  # fmt: skip
"""Family -> names that belong to it, SPDX or as the Hugging Face Hub spells
them. Any other name has terms of its own."""
ORDER = (UNKNOWN, OWN_TERMS, NON_COMMERCIAL, NO_DERIVATIVES, SHARE_ALIKE, ATTRIBUTION, PERMISSIVE, PUBLIC_DOMAIN)
"""The most restrictive family first: what is not known may be forbidden."""

HUB = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research",
    "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0",
    "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr",
    "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "grok2-community", "gemma",
}  # fmt: skip
"""Names of licenses on the Hugging Face Hub (docs/hub/repositories-licenses),
which refuses a card with any other, such as most of SPDX's."""
ON_THE_HUB = {"odc-by-1.0": "odc-by", "odbl-1.0": "odbl", "pddl-1.0": "pddl"}
"""SPDX -> the Hub, where it is not the same name in small letters."""


def name_on_the_hub(license: str) -> str | None:
    """None: the Hub has no name for it."""
    name = ON_THE_HUB.get(license.lower(), license.lower())
    return name if name in HUB else None


def family(license: str) -> str:
    """The family of a license or of an SPDX expression: of `A OR B` the less
    restrictive one, of `A AND B`, or with parentheses, the more restrictive."""
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
        {"listed": [{"license", "family", "of": ["base model", "teacher FOLDER",
        source, ...]}, ...], most restrictive first; "problems": [sentence, ...]}
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
    UNKNOWN: "is unknown: whether the model may be used or passed on is not clear.",
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
            lines.append(
                f"Not compatible: the {_named(one)} forbids commercial use, the {_named(other)} allows it{keeps}."
            )
        elif families == (SHARE_ALIKE, SHARE_ALIKE) and one["license"].casefold() == other["license"].casefold():
            continue  # the same license: names of SPDX are equal in any case
        elif families == (SHARE_ALIKE, SHARE_ALIKE):
            lines.append(
                f"Not compatible: the {_named(one)} and the {_named(other)} each require adapted versions to keep that"
                " license."
            )
        elif families[0] == SHARE_ALIKE:
            lines.append(
                f"The {_named(one)} requires adapted versions to keep it: {other['license']} alone does not cover the"
                " model."
            )
    return lines


def _named(entry: Mapping[str, Any]) -> str:
    """ "license of a.jsonl and 2 more (MIT)"."""
    first, *more = entry["of"]
    return f"license of {first}{f' and {len(more)} more' if more else ''} ({entry['license']})"
