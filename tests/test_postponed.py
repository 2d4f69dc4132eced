"""Modules whose import is postponed: libraries find what they name, and the first real use imports them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from dagster_project.core.postponed import loaded, postpone, postponed


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that notes its imports in a file beside it."""
    folder = tmp_path / "heavy_one"
    folder.mkdir()
    note = "import pathlib; pathlib.Path(__file__).with_suffix('.log').open('a').write('x')\n"
    (folder / "__init__.py").write_text(
        f"{note}from heavy_one import part\nMARK = lambda function: function\nVALUE = 7\n"
    )
    (folder / "part.py").write_text(f"{note}class Kind: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = [*sys.meta_path]
    yield "heavy_one"
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.split(".")[0] == "heavy_one"]:
        del sys.modules[name]


def imports(package: str) -> tuple[int, int]:
    """How often the package and its part were imported."""
    folder = Path(sys.path[0]) / package
    logs = folder / "__init__.log", folder / "part.log"
    return tuple(len(log.read_text()) if log.exists() else 0 for log in logs)  # type: ignore[return-value]


def test_a_given_name_does_not_import_the_module(package: str) -> None:
    postpone({package: {"MARK": lambda function: "unmarked"}})
    module = importlib.import_module(package)
    assert module.MARK(1) == "unmarked"
    assert imports(package) == (0, 0)


@pytest.mark.parametrize(
    "use",
    [
        "import heavy_one; value = heavy_one.VALUE",
        "from heavy_one import VALUE as value",
        "import heavy_one, heavy_one.part; value = 7 if heavy_one.part.Kind() else 0",
        "from heavy_one.part import Kind; import heavy_one; value = 7 if Kind is heavy_one.part.Kind else 0",
        "import heavy_one; from heavy_one import part; value = 7 if part.__spec__.origin == part.__file__ else 0",
    ],
)
def test_any_other_use_imports_everything_once(package: str, use: str) -> None:
    postpone({package: {"MARK": None}})
    importlib.import_module(package)
    names: dict[str, object] = {}
    exec(use, names)
    assert names["value"] == 7
    assert imports(package) == (1, 1)
    assert not [one for one in sys.meta_path if type(one).__name__ == "Postponed" and package in one.modules]


def test_a_module_that_is_kept_from_before_its_import_finds_all_names(package: str) -> None:
    postpone({package: {"MARK": None}})
    early = importlib.import_module(package)
    late = loaded(package)
    assert early is not late
    assert early.VALUE == late.VALUE == 7
    assert vars(early)["VALUE"] == 7 and early.MARK is late.MARK
    assert loaded(package) is late
    assert imports(package) == (1, 1)


def test_after_the_block_a_package_is_imported_as_usual(package: str) -> None:
    with postponed(package):
        early = importlib.import_module(package)
    assert imports(package) == (0, 0)
    assert importlib.import_module(package).VALUE == 7 == early.VALUE
    assert imports(package) == (1, 1)


def test_a_package_that_was_imported_before_stays(package: str) -> None:
    before = importlib.import_module(package)
    with postponed(package):
        assert importlib.import_module(package) is before
    assert importlib.import_module(package) is before


def test_using_a_given_name_does_not_import_the_package(package: str) -> None:
    with postponed(package, VALUE=1):
        assert importlib.import_module(package).VALUE == 1
    assert imports(package) == (0, 0)


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORTED = """
import sys
from dagster_project.training.methods.hardware import import_libraries
import_libraries()
"""


def test_the_libraries_do_not_import_the_compiler() -> None:
    """Were torch or transformers to import it in another way, all starts would
    take longer again, without any other sign."""
    heavy = [
        "torch._dynamo.utils",
        "torch._inductor",
        "torch.distributed.tensor._ops",
        "torch.export.graph_signature",
    ]
    if Version(version("torch")) < Version("2.15"):  # whose flex_attention imports it
        heavy.append("sympy")
    assert in_a_process(f"{IMPORTED}print([name for name in {heavy} if name in sys.modules])").strip() == "[]"


WITHOUT_KERNELS = """
def waits():
    return type(sys.modules["torch._refs"]).__name__ == "_Waiting"
assert waits() and "sympy" not in sys.modules
"""


def test_a_model_is_loaded_without_the_kernels_in_python(tiny_model: Path) -> None:
    in_a_process(f"""{IMPORTED}{WITHOUT_KERNELS}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r}, use_safetensors=True)
drawn = torch.rand(2, generator=torch.Generator().manual_seed(1))
loss = model(torch.arange(4)[None], labels=torch.arange(4)[None]).loss
loss.backward()
torch.optim.AdamW(model.parameters()).step()
assert waits() and "sympy" not in sys.modules
""")


def test_a_model_that_needs_a_kernel_in_python_gets_it() -> None:
    """Its rotary embedding is computed by `torch.where`, which has no kernel in C++ on the meta device."""
    out = in_a_process(f"""{IMPORTED}{WITHOUT_KERNELS}
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
rope = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16)
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, vocab_size=32, rope_parameters=rope)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
assert not waits()
print({{weight.device.type for weight in model.parameters()}}, model.model.rotary_emb.inv_freq.shape[0])
""")
    assert out.strip() == "{'meta'} 4"


def test_an_operation_without_any_kernel_still_fails() -> None:
    out = in_a_process(f"""{IMPORTED}{WITHOUT_KERNELS}
import torch
library = torch.library.Library("without_kernels", "DEF")
library.define("nothing(Tensor x) -> Tensor")
for _ in range(2):
    with torch.device("meta"):
        try:
            torch.nn.functional.handle_torch_function  # a name of torch's own
            torch.ops.without_kernels.nothing(torch.empty(1))
        except NotImplementedError as error:
            print("Meta" in str(error), waits())
""")
    assert [line.split()[0] for line in out.splitlines()] == ["True", "True"]


@pytest.mark.parametrize(
    "use",
    ["torch.broadcast_shapes((2, 1), (3,))", "torch._decomp.core_aten_decompositions()", "torch._prims.sin",
     "__import__('torch._decomp.decompositions')"],
)  # fmt: skip
def test_parts_of_torch_that_wait_are_found_by_their_names(use: str) -> None:
    in_a_process(f"{IMPORTED}{WITHOUT_KERNELS}\nimport torch\n{use}")


def test_a_generator_that_exists_before_the_kernels_still_works() -> None:
    in_a_process(f"""{IMPORTED}{WITHOUT_KERNELS}
import torch
from dagster_project.core.torch_imports import load_meta_kernels
early = torch.Generator().manual_seed(5)
expected = torch.rand(2, generator=torch.Generator().manual_seed(5))
load_meta_kernels()
assert not waits()
assert torch.equal(torch.rand(2, generator=early), expected)
assert torch.equal(torch.rand(2, generator=torch.Generator().manual_seed(5)), expected)
assert isinstance(early, torch.Generator)
""")


def test_masking_secrets_imports_no_http_client() -> None:
    code = "import sys; from dagster_project.curation.checks.privacy import mask; print(mask('a'))"
    assert in_a_process(f"{code}; print('requests' in sys.modules)").split() == ["a", "False"]


def test_the_compiler_works_when_it_is_used() -> None:
    out = in_a_process(f"""{IMPORTED}
import torch
def f(x): return torch.sin(x) + 1
x = torch.arange(4.0)
assert torch.equal(torch.compile(f, backend="eager")(x), f(x))
from torch._dynamo.utils import counters
print(counters["stats"]["unique_graphs"])
program = torch.export.export(torch.nn.Linear(4, 2), (torch.ones(1, 4),))
assert program.module()(torch.ones(1, 4)).shape == (1, 2)
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
with TransformGetItemToIndex(): pass
from accelerate.utils.other import is_compiled_module
assert is_compiled_module(torch.compile(torch.nn.Linear(2, 2))) and not is_compiled_module(torch.nn.Linear(2, 2))
""")
    assert out.strip() == "1"


def test_masks_that_transformers_traces_are_the_same() -> None:
    """The one class of the compiler that transformers calls itself."""
    in_a_process(f"""{IMPORTED}
import torch
from transformers import masking_utils
assert "torch._dynamo.utils" not in sys.modules
call = dict(batch_size=1, q_length=3, kv_length=3, device="cpu", dtype=torch.float32, allow_is_causal_skip=False)
traced = masking_utils.sdpa_mask(mask_function=masking_utils.causal_mask_function, use_vmap=True, **call)
plain = masking_utils.sdpa_mask(mask_function=masking_utils.causal_mask_function, use_vmap=False, **call)
assert torch.equal(traced, plain), (traced, plain)
assert "torch._dynamo.utils" in sys.modules
""")


def test_a_process_of_a_group_has_the_libraries_for_groups(tmp_path: Path) -> None:
    in_a_process(f"""
import torch.distributed as dist
dist.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
{IMPORTED}
from transformers.utils import is_torch_distributed_available
assert is_torch_distributed_available() and "torch.distributed.tensor._ops" in sys.modules
dist.destroy_process_group()
""")


def test_a_model_is_saved_and_trl_imported_without_distributed_tensors(tiny_model: Path, tmp_path: Path) -> None:
    in_a_process(f"""{IMPORTED}
from transformers import AutoModelForCausalLM
from trl import SFTTrainer
model = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r}, use_safetensors=True)
model.save_pretrained({str(tmp_path)!r})
assert "torch.distributed.tensor._ops" not in sys.modules
""")


def test_a_distributed_tensor_is_one_for_a_library_that_took_the_class_before(tmp_path: Path) -> None:
    in_a_process(f"""{IMPORTED}
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor as early
assert dist.tensor.DTensor is early and not isinstance(torch.ones(2), early)
assert "torch.distributed.tensor._ops" not in sys.modules
dist.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh
found = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Replicate()])
assert type(found) is DTensor and DTensor is not early and dist.tensor.DTensor is DTensor
assert isinstance(found, early) and not isinstance(torch.ones(2), early)
assert early.from_local == DTensor.from_local and not hasattr(early, "no_such_name")
dist.destroy_process_group()
""")


def test_a_single_process_takes_torch_for_one_without_groups_until_it_joins_one(tmp_path: Path) -> None:
    in_a_process(f"""{IMPORTED}
import torch.distributed as dist
from transformers.utils import is_torch_distributed_available
assert not is_torch_distributed_available() and not dist.is_available()
dist.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
assert dist.is_available()
dist.destroy_process_group()
""")
