"""Work of llama.cpp in a separate process, because it ends its process where a file is not as it expects, and it writes to stderr. Imports nothing of this project.

Reads one request as JSON from stdin and writes the answer as JSON to stdout: {"quantize": [source, target, format]} or
{"tokenize": file, "texts": [...], "ends": [ids]}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

FILE_TYPES = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
"""Format -> its name in llama.h."""


def _library() -> tuple[Any, Any]:
    # The package documents this module as its access to the C interface; llama.h has no other stable one.
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    return get_ffi(), get_lib()


def _quantize(source: str, target: str, form: str) -> dict[str, Any]:
    ffi, lib = _library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, FILE_TYPES[form])
    params.nthread = int(os.environ.get("OMP_NUM_THREADS") or 0)
    pointer = ffi.new("llama_model_quantize_params *", params)
    if code := lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), pointer):
        raise SystemExit(f"error: llama_model_quantize returned {code}")
    return {}


def _tokenize(file: str, texts: Sequence[str], ends: Sequence[int]) -> dict[str, Any]:
    ffi, lib = _library()
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(os.fsencode(file), params)
    if model == ffi.NULL:
        raise SystemExit("error: the file was refused")
    vocab = lib.llama_model_get_vocab(model)

    def tokens(text: str) -> list[int]:
        content = text.encode()
        room = len(content) + 16
        found = ffi.new("llama_token[]", room)
        count = lib.llama_tokenize(vocab, content, len(content), found, room, True, True)
        return list(found[0:count])

    return {"tokens": [tokens(text) for text in texts], "ends": [bool(lib.llama_vocab_is_eog(vocab, one)) for one in ends]}


def main() -> None:
    request = json.load(sys.stdin)
    if "quantize" in request:
        answer = _quantize(*request["quantize"])
    else:
        answer = _tokenize(request["tokenize"], request["texts"], request["ends"])
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
