"""The machine that computed a stage, as its report records it under `machine`:
what can change the last bits of floating-point results.

Never a host name, a path or a time. It is in no output and in no identity of a
run; `pedigree verify` compares it (docs/decisions/021).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
DRIVER = Path("/proc/driver/nvidia/version")

FLAGS = {
    "sse4_1", "sse4_2", "avx", "avx2", "f16c", "fma", "fma4", "avx_vnni", "avx_vnni_int8", "avx_ne_convert",
    "avx_ifma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512ifma", "avx512vbmi",
    "avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "asimddp", "asimdfhm", "fphp", "bf16",
    "i8mm", "sve", "sve2", "svebf16", "svei8mm", "sme", "sme2",
}  # fmt: skip
"""Instruction sets for arithmetic, as Linux names them in /proc/cpuinfo (x86 and Arm)."""

LIMITS = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "OPENBLAS_CORETYPE",
    "NPY_DISABLE_CPU_FEATURES", "GLIBC_TUNABLES", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
"""Environment variables that choose other kernels than the processor's own."""

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
ONEDNN = {
    "SSE41": {"sse4_1"},
    "AVX": {"avx"},
    "AVX2": {"avx2"},
    "AVX2_VNNI": {"avx2", "avx_vnni"},
    "AVX2_VNNI_2": {"avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert"},
    "AVX512_CORE": AVX512,
    "AVX512_CORE_VNNI": AVX512 | {"avx512_vnni"},
    "AVX512_CORE_BF16": AVX512 | {"avx512_vnni", "avx512_bf16"},
    "AVX512_CORE_FP16": AVX512 | {"avx512_vnni", "avx512_bf16", "avx_vnni", "avx512_fp16"},
    "AVX512_CORE_AMX": (
        AVX512 | {"avx512_vnni", "avx512_bf16", "avx_vnni", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
    ),
    "AVX512_CORE_AMX_FP16": (
        AVX512
        | {"avx512_vnni", "avx512_bf16", "avx_vnni", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"}
    ),
}
"""oneDNN's instruction sets, weakest first (dnnl_cpu_isa_t, oneDNN 3.12) -> the flags they need. torch does not export
oneDNN's own answer, dnnl_get_effective_cpu_isa; tests/test_machine.py compares with what ONEDNN_VERBOSE=1 prints."""


def machine() -> dict[str, Any]:
    """The machine as this process uses it.

    To be called after the computation: threads and GPU are then those that it used.

    Returns:
        {"cpu": the processor's name, "architecture", "vendor", "flags", "caches", "instruction_set": {"torch",
        "onednn"}, "threads", "torch": {"version", "git", "cuda"}, "libraries": {name: version}, "packages": see
        `packages`}; "limits": environment variables that choose kernels, if any is set; "cuda": {"device",
        "capability", "driver", "cudnn"}, if this process used a GPU.
    """
    import torch

    cpu = _cpu()
    limits = {name: os.environ[name] for name in LIMITS if os.environ.get(name)}
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "vendor": cpu.get("vendor_id") or " ".join(filter(None, (cpu.get("CPU implementer"), cpu.get("CPU part")))),
        "flags": flags_of(cpu),
        "caches": _caches(),
        "instruction_set": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "onednn": onednn(set(flags_of(cpu)), limits),
        },
        "threads": torch.get_num_threads(),
        "torch": {"version": torch.__version__, "git": torch.version.git_version, "cuda": torch.version.cuda},
        "libraries": _libraries(torch.__config__.show()),
        "packages": packages(),
        **({"limits": limits} if limits else {}),
        **({"cuda": _cuda()} if torch.cuda.is_available() and torch.cuda.is_initialized() else {}),
    }


METADATA = ("METADATA", "PKG-INFO")
"""Files with the name of a distribution. Without one, importlib.metadata gives
no name, and its backport, which other libraries load, raises."""


def packages() -> str:
    """The environment: sha256 over the lines "name==version" of all installed distributions, names normalized and lines
    sorted. The libraries that setuptools contains, and adds to `sys.path` when it is imported, are not installed."""
    folders = [folder for folder in sys.path if Path(folder).parts[-2:] != ("setuptools", "_vendor")]
    lines = {
        f"{re.sub('[-_.]+', '-', one.name).lower()}=={one.version}\n" for one in named(distributions(path=folders))
    }
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def named(found: Iterable[Distribution]) -> Iterator[Distribution]:
    """Those with a name.

    An interrupted installation can leave a `dist-info` folder without metadata, which pip does not count either.
    """
    return (one for one in found if any(map(one.read_text, METADATA)) and one.name)


def onednn(flags: set[str], limits: dict[str, str]) -> str:
    """The strongest instruction set that oneDNN uses: of those the processor
    has, up to the limit of ONEDNN_MAX_CPU_ISA."""
    limit = (limits.get("ONEDNN_MAX_CPU_ISA") or limits.get("DNNL_MAX_CPU_ISA") or "").upper()
    names = list(ONEDNN)
    # oneDNN ignores a name that it does not know
    allowed = names[: names.index(limit) + 1] if limit in ONEDNN else names
    return next((name for name in reversed(allowed) if ONEDNN[name] <= flags), "")


def flags_of(cpu: dict[str, str]) -> list[str]:
    return sorted(FLAGS & set((cpu.get("flags") or cpu.get("Features") or "").split()))


def _cpu() -> dict[str, str]:
    """The first processor in /proc/cpuinfo; empty on another system than Linux."""
    if not CPUINFO.is_file():
        return {}
    first = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _caches() -> dict[str, str]:
    """Level -> size of the first processor's caches.

    MKL and oneDNN cut products into blocks by them, which orders the sums. Linux leaves out files whose value the
    firmware does not state, on many Arm machines the size.
    """
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        files = [folder / name for name in ("level", "type", "size")]
        level, kind, size = (file.read_text().strip() if file.is_file() else "" for file in files)
        if level and size and kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _libraries(built_with: str) -> dict[str, str]:
    """Versions of the libraries that compute: those built into torch, the BLAS of numpy, and of scipy where it is
    loaded, with the kernels in use, and the C library.

    Args:
        built_with: torch.__config__.show().
    """
    from threadpoolctl import threadpool_info

    mkl = re.search(r"Math Kernel Library Version (.+?) for ", built_with)
    mkldnn = re.search(r"MKL-DNN v(\S+) \(Git Hash (\w+)", built_with)
    blas = re.search(r"BLAS_INFO=(\w+)", built_with)
    others = {
        " ".join(filter(None, (one["internal_api"], one["version"], one.get("architecture"))))
        for one in threadpool_info()
        if one["user_api"] == "blas"
    }
    return {
        **({"blas": blas[1]} if blas else {}),
        **({"mkl": mkl[1]} if mkl else {}),
        **({"onednn": f"{mkldnn[1]} {mkldnn[2][:12]}"} if mkldnn else {}),
        **({"numpy": ", ".join(sorted(others))} if others else {}),
        "libc": " ".join(platform.libc_ver()).strip(),
    }


def _cuda() -> dict[str, Any]:
    import torch

    driver = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text()) if DRIVER.is_file() else None
    return {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": driver[1] if driver else None,
        "cudnn": torch.backends.cudnn.version(),
    }
