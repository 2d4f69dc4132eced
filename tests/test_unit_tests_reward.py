"""Unit tests as a reward: code of an answer runs in a process of its own,
within limits, and only if params.yaml says how."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from dagster_project.core.errors import InputError
from dagster_project.training.trainers.alignment import code_process, code_runner
from dagster_project.training.trainers.alignment.code_runner import code_in, passes
from dagster_project.training.trainers.alignment.ready_rewards import READY, parse_ready
from dagster_project.training.trainers.alignment.rewards import Rewards, check

WHERE = "aligned.x.rewards"
ADD = "def add(a, b):\n    return a + b\n"
MEMORY = 512 << 20
UNPROTECTED = {"unit_tests": {"run": "unprotected", "seconds": 2}}


@pytest.fixture(scope="module")
def sandbox() -> None:
    try:
        passes("", "", True, 2, MEMORY)
    except InputError as error:
        pytest.skip(str(error))


def task(tests: Any, key: str = "tests") -> dict[str, Any]:
    chosen = [{"role": "assistant", "content": ADD}]
    return {
        "example_id": "id",
        "prompt": [{"role": "user", "content": "Add."}],
        "chosen": chosen,
        "tools": None,
        "meta": json.dumps({key: tests}),
    }


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        (ADD, 1.0),
        (f"Here:\n```python\n{ADD}```\nThat is all.", 1.0),
        (f"```python\nadd = None\n```\nBetter:\n```\n{ADD}```", 1.0),
        ("def add(a, b):\n    return a - b\n", 0.0),
        ("def add(a, b) return", 0.0),
        ("", 0.0),
        (f"{ADD}raise SystemExit(0)", 0.0),
        (f"{ADD}import os\nos._exit(0)", 0.0),
        (f"{ADD}print('ok'); import sys; sys.stdout.flush()", 1.0),
        ("\ud800", 0.0),
    ],
)
def test_an_answer_is_rewarded_if_its_code_passes_the_tests_of_the_record(answer: str, reward: float) -> None:
    found = Rewards(UNPROTECTED, None)([task("assert add(2, 3) == 5")], [said(answer)])
    assert found == ([reward], {"unit_tests": [reward]})


def test_tests_can_be_a_list_under_another_key_and_all_must_pass() -> None:
    entry = {"unit_tests": {"run": "unprotected", "tests": "test_list"}}
    tasks = [
        task(tests, "test_list")
        for tests in (
            ["assert add(1, 1) == 2", "assert add(1, 2) == 3"],
            ["assert add(1, 1) == 2", "assert add(1, 2) == 4"],
        )
    ]
    assert Rewards(entry, None)(tasks, [said(ADD)] * 2)[0] == [1.0, 0.0]
    reward = parse_ready("unit_tests", entry["unit_tests"], WHERE, Path())
    assert [
        reward.has_target(one)
        for one in (tasks[0], task("x"), task([], "test_list"), task("  ", "test_list"), {**tasks[0], "meta": None})
    ] == [
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "tests",
    [
        "def check(candidate):\n    assert candidate(1, 2) == 3\n",  # HumanEval's
        "METADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n",
        (
            "import unittest\n\nclass Sums(unittest.TestCase):\n    def test_add(self):\n        assert add(1, 2) =="
            " 3\n\nif __name__ == '__main__':\n    unittest.main()\n"
        ),
        "'Tests.'\ndef test_add():\n    assert add(1, 2) == 3",
        "assert add(1, 2 ==",
        ["assert add(1, 2) == 3", {"input": "1 2", "output": "3"}],
        {"inputs": ["1 2"], "outputs": ["3"]},
        "\0",
    ],
)
def test_tests_that_would_pass_whatever_the_answer_is_are_no_target(tests: Any) -> None:
    reward = parse_ready("unit_tests", UNPROTECTED["unit_tests"], WHERE, Path())
    assert not reward.has_target(task(tests))
    if isinstance(tests, str) and "check" in tests:
        called = f"{tests}\ncheck(add)"
        assert reward.has_target(task(called))
        assert Rewards(UNPROTECTED, None)([task(called)] * 2, [said(ADD), said("def add(a, b): return 0")])[0] == [
            1.0,
            0.0,
        ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (1.0, r"unit_tests\.run: unit_tests runs code that the model writes, and is off unless you say how"),
        ({"seconds": 3}, "is off unless you say how"),
        ({"run": "yes"}, r"unit_tests\.run"),
        ({"run": "sandbox", "seconds": 0}, r"unit_tests\.seconds"),
    ],
)
def test_nothing_runs_unless_params_say_how(entry: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check({"unit_tests": entry}, WHERE, Path())


@pytest.mark.parametrize("isolated", [True, False])
def test_limits_end_what_takes_too_long_or_too_much(
    isolated: bool, sandbox: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_runner, "WAITS", 3)
    for code in (
        "while True: pass",
        "x = bytearray(1 << 32)",
        "import time; time.sleep(60)",
        "def f(): return f()\nf()",
    ):
        began = time.monotonic()
        assert not passes(code, "", isolated, 1, MEMORY)
        assert time.monotonic() - began < 45


def test_files_are_limited_in_size_and_number() -> None:
    for size, fits in ((1 << 19, True), (1 << 21, False)):
        assert (
            passes(
                f"open('x', 'wb').write(bytes({size}))",
                f"import os; assert os.path.getsize('x') == {size}",
                False,
                2,
                MEMORY,
            )
            == fits
        )
    for number, fits in ((20, True), (40, False)):
        assert passes(f"found = [open('/dev/null') for _ in range({number})]", "", False, 2, MEMORY) == fits


def test_code_has_no_variables_of_the_environment_and_an_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert passes("import os", "assert 'HF_TOKEN' not in os.environ and os.listdir() == []", False, 2, MEMORY)
    assert passes("import sys", "assert not any('site-packages' in path for path in sys.path)", False, 2, MEMORY)


def test_in_the_sandbox_nothing_can_be_written_and_nobody_reached(sandbox: None, tmp_path: Path) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port, file = server.getsockname()[1], tmp_path / "written"
    writes = f"open({str(file)!r}, 'w').write('x')"
    connects = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
    kills = f"import os; os.kill({os.getpid()}, 0)"
    undoes = (
        "import ctypes; assert ctypes.CDLL(None).syscall(442, -1, b'/', 0x8000, (ctypes.c_uint64 * 4)(0, 1, 0, 0), 32)"
        " == 0"
    )
    spies = f"open('/proc/{os.getpid()}/environ', 'rb').read()"
    path = socket.socket(socket.AF_UNIX)
    path.bind(str(tmp_path / "s"))
    path.listen()
    asks = f"import socket; socket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})"
    device = "open('/dev/null', 'w').write('x')"
    own, memory = "open('x', 'w').write('x')", "open('/dev/shm/pedigree-test', 'w').write('x')"
    for code in (writes, connects, asks, kills, spies, device, own, memory, undoes):
        assert not passes(code, "", True, 2, MEMORY), code
    for code in (writes, connects, asks, kills, spies, device, own, memory):
        assert passes(code, "", False, 2, MEMORY), f"otherwise the sandbox is not what prevents it: {code}"
    assert file.read_text() == "x"
    Path("/dev/shm/pedigree-test").unlink()
    server.close()
    path.close()


def test_code_in_the_sandbox_starts_no_process_and_no_thread(sandbox: None) -> None:
    starts = (
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import threading\nthreading.Thread(target=print).start()",
    )
    for code in starts:
        assert not passes(code, "", True, 2, MEMORY)
        assert passes(
            f"try:\n    {code.replace(chr(10), chr(10) + '    ')}\nexcept (OSError, RuntimeError):\n    pass",
            "",
            True,
            2,
            MEMORY,
        )


LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
RESULT = "import os, sys\nresult = sys._getframe(1).f_locals['result']\n"


@pytest.mark.parametrize(
    "call",
    [
        # with a user namespace it could mount memory, and would not end with the training
        "libc.unshare(0x10000000 | 0x20000)",
        "libc.prctl(1, 0, 0, 0, 0)",
        "libc.shmget(0, 1 << 20, 0o1600)",
        "libc.msgget(0, 0o1600)",
        "libc.ptrace(0, 0, 0, 0)",
        "libc.setns(os.open('/proc/self/ns/user', os.O_RDONLY), 0)",
    ],
)
def test_calls_that_reach_past_namespaces_and_limits_are_refused_in_the_sandbox(call: str, sandbox: None) -> None:
    code = f"{LIBC}import errno\nlibc = ctypes.CDLL(None, use_errno=True)\nfound = {call}\n"
    assert passes(code, "assert found == -1 and ctypes.get_errno() == errno.EPERM", True, 2, MEMORY)
    if "setns" not in call and "unshare" not in call:
        assert passes(code, "assert found != -1", False, 2, MEMORY), "otherwise the sandbox is not what prevents it"


@pytest.mark.parametrize("isolated", [True, False])
def test_code_that_leaves_its_session_and_its_parent_ends_at_the_limit(
    isolated: bool, sandbox: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_runner, "WAITS", 2)
    began = time.monotonic()
    assert not passes(
        f"{LIBC}import time\nos.setsid()\nlibc.prctl(1, 0, 0, 0, 0)\ntime.sleep(600)", "", isolated, 1, MEMORY
    )
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("written", ["b'unable: no sandbox'", "bytes(42)", "b''"])
def test_code_cannot_stop_the_training_by_what_it_writes(written: str, isolated: bool, sandbox: None) -> None:
    assert not passes(f"{RESULT}os.write(result, {written})\nos._exit(42)", "", isolated, 2, MEMORY)


OUTER = (
    "import os, glob\n"
    "found = [p for p in glob.glob('/proc/[0-9]*') if b'code_process.py' in open(p + '/cmdline', 'rb').read()]\n"
    "for p in found:\n"
    "    try:\n        result = os.open(p + '/fd/1', os.O_WRONLY)\n        break\n    except OSError:\n        pass\n"
)
"""Opens the standard output of the process that waits for the code, through /proc."""


@pytest.mark.parametrize("opens", [RESULT, OUTER])
def test_what_code_writes_takes_no_memory_of_the_training(
    opens: str, sandbox: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_runner, "WAITS", 2)
    read: list[int] = []
    communicate = subprocess.Popen.communicate

    def counted(process: subprocess.Popen[bytes], *arguments: Any, **named: Any) -> Any:
        found = communicate(process, *arguments, **named)
        read.append(len(found[0]))
        return found

    monkeypatch.setattr(subprocess.Popen, "communicate", counted)
    assert not passes(f"{opens}for _ in range(64): os.write(result, bytes(1 << 20))\nos._exit(0)", "", True, 1, MEMORY)
    assert read == [0]


@pytest.mark.parametrize("isolated", [True, False])
def test_code_ends_with_a_training_that_is_killed(isolated: bool, sandbox: None) -> None:
    mark = f"# {os.urandom(8).hex()}"
    call = (
        "from dagster_project.training.trainers.alignment.code_runner import passes\npasses('import time;"
        f" time.sleep(300) {mark}', '', {isolated}, 60, {MEMORY})"
    )
    training = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT)

    def running() -> set[int]:
        """Ids of the processes that run code, of this training."""
        found = {
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if code_process.__file__.encode() in _read(path)
        }
        return {one for one in found if _ancestors(one) & {training.pid}}

    while len(started := running()) < 2:
        assert training.poll() is None
    training.kill()
    training.wait()
    end = time.monotonic() + 60
    while any(code_process.__file__.encode() in _read(Path(f"/proc/{one}/cmdline")) for one in started):
        assert time.monotonic() < end


def _ancestors(process: int) -> set[int]:
    found = set[int]()
    while process > 1 and process not in found:
        found.add(process)
        parents = re.findall(rb"^PPid:\t(\d+)", _read(Path(f"/proc/{process}/status")), re.MULTILINE)
        process = int(parents[0]) if parents else 0
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_without_a_sandbox_on_this_system_the_training_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process = tmp_path / "code_process.py"
    process.write_text(
        Path(code_process.__file__)
        .read_text()
        .replace('_called("unshare", NEW_NAMESPACES)', 'raise OSError(1, "Operation not permitted")')
    )
    monkeypatch.setattr(code_runner.code_process, "__file__", str(process))
    reward = parse_ready("unit_tests", {"run": "sandbox"}, WHERE, Path())
    with pytest.raises(
        InputError, match=r"there is no sandbox here: Operation not permitted\nhint: .*docs/security\.md"
    ):
        reward.probe()
    parse_ready("unit_tests", {"run": "unprotected"}, WHERE, Path()).probe()


def test_the_last_block_of_an_answer_is_its_code() -> None:
    assert (
        code_in("```py\na\n```\ntext\n```\nb\n```") == "b\n"
        and code_in("no block") == "no block"
        and code_in("```\nopen") == "```\nopen"
    )
    assert "unit_tests" in READY
