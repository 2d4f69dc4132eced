"""With this folder first on PYTHONPATH each Python process that ends adds a
line of JSON to the file LOADED_MODULES: its arguments and modules."""

import os
import sys

if os.environ.get("LOADED_MODULES"):
    import atexit
    import json

    def _note() -> None:
        loaded = sorted(name for name, module in sys.modules.items() if module is not None)
        # nothing more is imported
        with open(os.environ["LOADED_MODULES"], "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps({"arguments": sys.orig_argv[1:], "modules": loaded}) + "\n")

    atexit.register(_note)
