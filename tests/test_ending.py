"""Ctrl-C prints one line and exits with 130; a closed pipe prints nothing. In real processes."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import tool

from dagster_project.commands import ending
from dagster_project.lineage import lineage
from dagster_project.lineage.database import INDEX_FILE
from dagster_project.lineage.scratch_folder import FOLDERS, scratch_folder
from dagster_project.lineage.unfinished_erasure import FILE

INTERRUPTED = 130
"""The exit code."""


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "dagster_project", *arguments], cwd=root, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def interrupted(process: subprocess.Popen[str], before: str = "") -> str:
    """Press Ctrl-C; the lines on stderr."""
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED and "Traceback" not in out + error, error
    return before + error


@pytest.mark.parametrize("seconds", [0.5, 1.2])
@pytest.mark.parametrize("command", ["verify --integrity", "sync"])
def test_ctrl_c_while_libraries_are_imported_is_one_line(root: Path, command: str, seconds: float) -> None:
    process = start(root, *command.split())
    time.sleep(seconds)
    with suppress(ProcessLookupError):  # it has ended already
        os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode in {0, INTERRUPTED} and "Traceback" not in out + error, error
    if process.returncode:  # otherwise it ended before Ctrl-C could interrupt it
        part = "interrupted; a part may have been written\nhint: run the same command again\n"  # of sync
        assert error in {"interrupted; nothing was recorded\n", part, ""}


@pytest.mark.parametrize("code", ["{}", "exec({!r})"])  # as `dataclasses` defines methods
def test_ctrl_c_while_a_stage_prepares_its_process_is_one_line(tmp_path: Path, code: str) -> None:
    (tmp_path / "transformers").mkdir()
    interrupt = code.format("import signal; signal.raise_signal(signal.SIGINT)")
    (tmp_path / "transformers" / "__init__.py").write_text(interrupt + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "dagster_project", "run", "tokenized"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (INTERRUPTED, "interrupted; nothing was recorded\n")


def test_ctrl_c_while_a_compiled_module_starts_waits_for_its_end() -> None:
    """orjson, in Rust, imports modules while it is initialized, and crashes if that fails."""
    script = """
import signal, sys, time
from dagster_project.commands.ending import interrupts
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "uuid" and sys.modules.get("orjson"):
            print("pressed")
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
try:
    with interrupts():
        import orjson
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stdout) == (0, "pressed\ninterrupted\n"), done.stderr


def test_ctrl_c_while_a_command_waits_for_another_one_is_one_line(root: Path) -> None:
    lineage.audit(root, "tok")  # makes the index
    with closing(sqlite3.connect(root / INDEX_FILE, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        process = start(root, "audit", "tok")
        assert process.stderr is not None
        waiting = process.stderr.readline()
        assert waiting.startswith("waiting: ")
        assert interrupted(process) == "interrupted; nothing was recorded\n"


def test_an_interrupt_does_not_say_that_nothing_happened_where_something_did(tmp_path: Path) -> None:
    def said(command: str) -> str:
        return str(ending.explained(KeyboardInterrupt(), ending.Interrupts(), command, tmp_path))

    assert said("erase") == said("verify") == ending.INTERRUPTED
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_text("{}")
    assert "the erasure is unfinished" in said("erase") and "hint: `pedigree erase --resume` goes on" in said("erase")
    assert said("verify") == ending.INTERRUPTED
    assert said("push") == said("sync") == "interrupted; a part may have been written\nhint: run the same command again"


@pytest.mark.parametrize("in_project", [True, False])
def test_a_temporary_folder_goes_also_if_its_removal_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_project: bool
) -> None:
    """It has copies of data, and the key of record ids."""
    interrupts = iter([KeyboardInterrupt()])
    rmdir = os.rmdir

    def interrupted(*given: Any, **options: Any) -> None:
        for error in interrupts:
            raise error
        rmdir(*given, **options)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if in_project:
        (tmp_path / ".dvc").mkdir()
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path) as folder:
        assert (folder.parent == tmp_path / FOLDERS) == in_project
        (folder / "data/keys").mkdir(parents=True)
        (folder / "data/keys/record_ids.key").write_text("secret")
        monkeypatch.setattr(os, "rmdir", interrupted)
    assert not [path for path in tmp_path.rglob("*") if not tmp_path.joinpath(FOLDERS).is_relative_to(path)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_the_end_of_the_terminal_end_a_command_as_ctrl_c_does_so_that_its_temporary_folders_are_removed(
    number: signal.Signals,
) -> None:
    """The scratch copy of `verify` has the inputs of stages, and the key of record ids."""
    before = signal.signal(number, signal.SIG_DFL)  # a library may have set its own
    with ending.interrupts() as found, pytest.raises(KeyboardInterrupt), ending.terminating(found, "verify"):
        signal.raise_signal(number)
    assert found.came and signal.getsignal(number) == signal.SIG_DFL
    with ending.interrupts() as found, ending.terminating(found, "run"):
        assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, signal.SIG_IGN)
    with ending.interrupts() as found, ending.terminating(found, "verify"):
        signal.raise_signal(number)
    assert not found.came and signal.getsignal(number) == signal.SIG_IGN, (
        "it was started with the signal ignored, as by nohup"
    )
    signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_is_repeated_at_once_does_not_end_the_removal_of_temporary_folders(
    number: signal.Signals,
) -> None:
    before = {
        one: signal.signal(one, kind)
        for one, kind in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler))
    }
    removed = []
    with ending.interrupts() as found, pytest.raises(KeyboardInterrupt), ending.terminating(found, "verify"):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            removed.append(True)
            found.raised -= ending.REPEATED
            with pytest.raises(KeyboardInterrupt):  # later, another one ends a command that waits
                signal.raise_signal(number)
    assert removed
    with ending.interrupts() as found, ending.terminating(found, "chat"):  # where it ends an answer
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    for one, kind in before.items():
        signal.signal(one, kind)


def test_ctrl_c_while_a_database_is_closed_shows_no_traceback() -> None:
    code = (
        "import signal, sqlalchemy as sa; from dagster_project.commands.ending import interrupts\n"
        "engine = sa.create_engine('sqlite://', poolclass=sa.pool.NullPool)\n"
        "connection = engine.raw_connection()\n"
        "engine.dialect.do_rollback = lambda _: signal.raise_signal(signal.SIGINT)\n"
        "try:\n"
        "    with interrupts(): connection.close()\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_ctrl_c_while_a_stage_runs_is_one_line_and_keeps_what_was_there(root: Path) -> None:
    before = (root / "data/tok/train.txt").read_bytes()
    code = (
        "import sys, small_pipeline as s; from pathlib import Path; import dagster_project.pipeline as p; p.PEDIGREE ="
        " s.PIPELINE\nimport dagster_project.orchestration.run_stage as r; r.run_stage.__defaults__ = (s.PIPELINE,"
        " None)\nfrom dagster_project.__main__ import main; sys.exit(main(['run', 'tok']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "SLOW": "tok"}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (root / ".dvc/tmp/pedigree/scratch/tok").exists():
        assert process.poll() is None
        time.sleep(0.1)
    assert interrupted(process) == "interrupted; nothing was recorded\n"
    assert (root / "data/tok/train.txt").read_bytes() == before and not (
        root / ".dvc/tmp/pedigree/scratch/tok"
    ).exists()


class Owner:
    pass


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost() -> None:
    came = []

    def callback(_: object) -> None:
        came.append(1)
        signal.raise_signal(signal.SIGINT)

    owner = Owner()
    reference = weakref.ref(owner, callback)
    with pytest.raises(KeyboardInterrupt), ending.interrupts() as interrupts:
        del owner
        gc.collect()
        time.sleep(5)
    assert came and interrupts.came and reference() is None
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("command", ["audit tok", "--help", "audit nothing"])
def test_a_closed_pipe_prints_nothing_and_keeps_the_exit_code(root: Path, command: str, both: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "dagster_project", *command.split()], cwd=root, text=True, check=False,
        stdout=writer, stderr=writer if both else subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    assert process.returncode == (2 if "nothing" in command else 0)
    assert (
        both
        or process.stderr == ""
        or ("nothing" in command and process.stderr.startswith("error: nothing: no such stage"))
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_an_answer_that_cannot_be_written_is_one_message(root: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dagster_project", "audit", "tok"],
            cwd=root,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1 and done.stderr.startswith("error: standard output: No space left on device\nhint: ")
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not shutil.which("sh"), reason="needs a shell")
def test_closed_streams_end_without_a_traceback(root: Path) -> None:
    command = f"exec {sys.executable} -m dagster_project audit tok >&-"
    done = subprocess.run(["sh", "-c", command], cwd=root, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_memory_that_ends_is_one_message(tmp_path: Path) -> None:
    for error in (
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):
        said = ending.explained(error, ending.Interrupts(), "run", tmp_path)
        assert said is not None and said.what == "out of memory" and "ulimit -v" in said.hint and said.exit_code == 1
    assert ending.explained(RuntimeError("defect"), ending.Interrupts(), "run", tmp_path) is None


@pytest.mark.parametrize("content", [b"no database" * 100, None], ids=["other bytes", "cut short"])
def test_a_damaged_database_of_dagster_names_the_folder_to_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    import sqlalchemy

    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    path = tmp_path / "index.db"
    with closing(sqlite3.connect(path)) as database:
        database.executescript("CREATE TABLE a (b TEXT); INSERT INTO a VALUES (printf('%20000s', 'x'))")
    path.write_bytes(content or path.read_bytes()[:6000])
    with (
        pytest.raises(sqlalchemy.exc.DatabaseError) as caught,
        sqlalchemy.create_engine(f"sqlite:///{path}").connect() as connection,
    ):
        connection.execute(sqlalchemy.text("SELECT * FROM a")).all()
    said = ending.explained(caught.value, ending.Interrupts(), "sync", tmp_path)
    assert said is not None and said.what == f"Dagster's home {tmp_path / '.dagster'}: a database is damaged"
    assert "delete that folder" in said.hint and said.exit_code == 2


def test_a_database_of_an_older_version_of_dagster_names_the_command_that_migrates_it(
    instance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster 1.4 has no results of asset checks."""
    import dagster as dg
    from sqlalchemy.exc import OperationalError

    monkeypatch.setenv("DAGSTER_HOME", instance.root_directory)
    for file in ("runs/index.db", "runs.db"):
        with closing(sqlite3.connect(Path(instance.root_directory, "history", file))) as database:
            database.executescript(
                "UPDATE alembic_version SET version_num = '5771160a95ad'; DROP TABLE IF EXISTS asset_check_executions"
            )
    key = dg.AssetCheckKey(dg.AssetKey(["tok"]), "dvc_in_sync")

    def latest() -> Any:
        return instance.event_log_storage.get_latest_asset_check_execution_by_key([key])

    with pytest.raises(OperationalError) as caught:
        latest()
    said = ending.explained(caught.value, ending.Interrupts(), "sync", tmp_path)
    assert said is not None and said.exit_code == 2 and "older version" in said.what
    assert f"`DAGSTER_HOME={instance.root_directory} dagster instance migrate`" in said.hint
    instance.upgrade()
    assert latest() == {}


def test_a_project_whose_path_is_not_utf8_is_one_message() -> None:
    error = UnicodeEncodeError("utf-8", "/caf\udce9", 4, 5, "surrogates not allowed")
    found = ending.explained(error, ending.Interrupts(), "sync", Path("/caf\udce9"))
    assert (
        found is not None
        and found.exit_code == 2
        and found.what.endswith("caf\\udce9': the path of the project is not UTF-8, or the locale is not")
    )
    assert ending.explained(error, ending.Interrupts(), "sync", Path("/cafe")) is None


def test_a_database_of_mlflow_that_cannot_be_used_is_not_said_to_be_one_of_dagster(tmp_path: Path) -> None:
    tool("mlflow")
    from mlflow import MlflowClient

    (tmp_path / "notes.txt").write_bytes(b"no database" * 100)
    with pytest.raises(Exception) as caught:
        MlflowClient(f"sqlite:///{tmp_path / 'notes.txt'}").get_experiment_by_name("pedigree")
    said = ending.explained(caught.value, ending.Interrupts(), "run", tmp_path)
    assert (
        said is not None
        and said.what.startswith("MLflow: ")
        and "file is not a database" in said.what
        and "MLFLOW_TRACKING_URI" in said.hint
    )


@pytest.mark.parametrize(
    ("old", "new"), [('"__class__"', '"__class__'), ('"AssetMaterialization"', '"AssetMaterialisation"'), ("{", "[")]
)
def test_a_damaged_record_in_a_database_of_dagster_does_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    import dagster as dg

    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    home = tmp_path / ".dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization("splits"))
        assert len(instance.get_asset_records()) == 1
        with closing(sqlite3.connect(home / "history/runs/index.db")) as database, database:
            database.execute(
                "UPDATE asset_keys SET last_materialization = replace(last_materialization, ?, ?)", (old, new)
            )
        with pytest.raises(Exception) as caught:
            instance.get_asset_records()
    said = ending.explained(caught.value, ending.Interrupts(), "sync", tmp_path)
    assert said is not None and said.what == f"Dagster's home {home}: a database is damaged" and said.exit_code == 2


def test_a_regular_expression_of_a_tokenizer_that_needs_too_many_steps_is_one_message(tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    with pytest.raises(BaseException, match="retry-limit") as caught:
        tokenizer.encode_batch(["a" * 60])
    said = ending.explained(caught.value, ending.Interrupts(), "run", tmp_path)
    assert said and said.exit_code == 2 and "a regular expression of the tokenizer cannot read a text" in said.what
