"""Measured tables in the docs: written by the benchmark that measured them, between two markers."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def replace(path: Path, name: str, table: str) -> None:
    """Replace the table between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; append it if there are no such
    markers."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = (path.read_text() if path.is_file() else "").partition(begin)
    path.write_text(before + begin + table + end + rest.partition(end)[2])


def show(path: Path | None, name: str, table: str) -> None:
    """Print a table, and write it to a file if one is given."""
    print(table, flush=True)
    if path:
        replace(path, name, table)


def machine() -> str:
    """The processor of this machine, for the text of a table, e.g. "AMD EPYC, 2
    cores, bfloat16 products without AMX"."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in info.splitlines())}
    flags = values.get("flags", "").split()
    products = (
        "AMX"
        if "amx_bf16" in flags
        else "bfloat16 products without AMX"
        if "avx512_bf16" in flags
        else "no bfloat16 products"
    )
    return (
        f"{values.get('model name', platform.processor() or 'unknown processor')}, {os.cpu_count()} cores, {products}"
    )
