"""With this folder on PYTHONPATH a stage command appends its CPU times to the
file START_LOG: until its `run`, and of the imports in `run`."""

import os
import sys

if os.environ.get("START_LOG") and sys.orig_argv[1:4] == ["-m", "dagster_project", "run"]:
    import atexit
    import json
    import threading
    from importlib import _bootstrap
    from time import process_time

    _found = {"stage": sys.orig_argv[4], "imports": 0.0}
    _depth = [0]
    _main = threading.get_ident()
    _inner = _bootstrap._find_and_load

    def _find_and_load(name, import_):
        if threading.get_ident() != _main:
            return _inner(name, import_)
        begin = process_time()
        _depth[0] += 1
        try:
            module = _inner(name, import_)
        finally:
            _depth[0] -= 1
            if not _depth[0]:
                _found["imports"] += process_time() - begin
        if name == "dagster_project.pipeline":
            _time_run(module)
        return module

    def _time_run(pipeline):
        inner = pipeline.module_of

        def module_of(stage):
            module = inner(stage)
            run = module.run
            if "began" not in _found and stage == _found["stage"].partition("@")[0] and not hasattr(run, "timed"):

                def timed(*arguments):
                    _found.update(began=process_time(), imports_before=_found["imports"])
                    report = run(*arguments)
                    _found.update(imports_in_run=_found["imports"] - _found["imports_before"])
                    return report

                timed.timed = True
                module.run = timed
            return module

        pipeline.module_of = module_of

    def _write():
        with open(os.environ["START_LOG"], "a", encoding="utf-8") as file:  # noqa: PTH123  (nothing more is imported)
            file.write(json.dumps({**_found, "total": process_time()}) + "\n")

    _bootstrap._find_and_load = _find_and_load
    atexit.register(_write)
