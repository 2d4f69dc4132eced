"""Work of llama.cpp in a separate process, because it ends its process where a file is not as it expects, and it writes
to stderr. Imports nothing of this project.

Reads one request as JSON from stdin and writes the answer as JSON to stdout: {"quantize": [source, target, format]},
{"tokenize": file, "texts": [...], "ends": [ids]} or {"logits": file, "ids":
[...], "target": file for float32 numbers, (tokens, vocabulary)}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
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


def _loaded(file: str, setting: str, value: int) -> tuple[Any, Any, Any]:
    """The library, and the model of a file, loaded with one setting that is not the default."""
    ffi, lib = _library()
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    setattr(params, setting, value)
    model = lib.llama_model_load_from_file(os.fsencode(file), params)
    if model == ffi.NULL:
        raise SystemExit("error: the file was refused")
    return ffi, lib, model


def _tokenize(file: str, texts: Sequence[str], ends: Sequence[int]) -> dict[str, Any]:
    ffi, lib, model = _loaded(file, "vocab_only", True)
    vocab = lib.llama_model_get_vocab(model)

    def tokens(text: str) -> list[int]:
        content = text.encode()
        room = len(content) + 16
        found = ffi.new("llama_token[]", room)
        count = lib.llama_tokenize(vocab, content, len(content), found, room, True, True)
        return list(found[0:count])

    return {
        "tokens": [tokens(text) for text in texts],
        "ends": [bool(lib.llama_vocab_is_eog(vocab, one)) for one in ends],
    }


def _logits(file: str, ids: Sequence[int], target: str) -> dict[str, Any]:
    ffi, lib, model = _loaded(file, "n_gpu_layers", 0)
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(len(ids), 32)
    if threads := int(os.environ.get("OMP_NUM_THREADS") or 0):
        settings.n_threads = settings.n_threads_batch = threads
    context = lib.llama_init_from_model(model, settings)
    if context == ffi.NULL:
        raise SystemExit("error: the context was refused")
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
    if code := lib.llama_decode(context, batch):
        raise SystemExit(f"error: llama_decode returned {code}")
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    with Path(target).open("wb") as written:
        for i in range(len(ids)):
            written.write(ffi.buffer(lib.llama_get_logits_ith(context, i), 4 * size))
    return {"vocabulary": size}


def main() -> None:
    request = json.load(sys.stdin)
    if "quantize" in request:
        answer = _quantize(*request["quantize"])
    elif "logits" in request:
        answer = _logits(request["logits"], request["ids"], request["target"])
    else:
        answer = _tokenize(request["tokenize"], request["texts"], request["ends"])
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
