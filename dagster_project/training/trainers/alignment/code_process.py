"""The process that runs an answer's code and the record's tests.

It is run as a file, by an interpreter without site-packages, and imports the standard library alone.

Its standard input has one JSON document: {"code", "tests", "sandbox", "seconds", "wait", "memory"}. Its exit status
says whether all tests passed. Code and tests run in a child, of which this process reads a few bytes and which it kills
after `wait` seconds; what they print goes nowhere.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

PASSED, FAILED, UNABLE = 40, 41, 42
"""Exit statuses; with UNABLE, the sandbox cannot be set up, for the reason on standard output."""
NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET: mounts, queues, users, processes and network of
its own."""
MS_REC, MS_PRIVATE, AT_RECURSIVE = 0x4000, 0x40000, 0x8000
READ_ONLY = 1 | 2 | 4
"""MOUNT_ATTR_RDONLY, _NOSUID and _NODEV: a device can be written on a mount that is read-only."""
SYS_MOUNT_SETATTR = 442
"""Since Linux 5.12, the same number on all processors."""
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, CAPABILITIES = 1, 38, 22, 2, 0x20080522
PROCESSORS = {
    "x86_64": (0xC000003E, (41, 56, 57, 58, 101, 157, 272, 308, 29, 64, 68, 248, 249, 250)),
    "aarch64": (0xC00000B7, (198, 220, 117, 167, 97, 268, 194, 190, 186, 217, 218, 219)),
}
"""Processor -> its number in AUDIT_ARCH, and those of the system calls socket, clone, fork and vfork (as far as it has
them), ptrace, prctl, unshare, setns, shmget, semget, msgget, add_key, request_key and keyctl."""
IO_URING_SETUP, CLONE3, OTHER_ABI = 425, 435, 0x40000000
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000
"""Results of a filter; REFUSE is the error EPERM."""
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
"""Instructions of a filter: load a word of the call, compare it, return."""
FILE = 1 << 20
"""Most bytes of a written file, where files can be written at all."""


def _called(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _refuse_calls() -> None:
    """Refuse calls that reach past the namespaces and limits.

    Sockets with a path, such as docker.sock, are outside of the network namespace, and can be written on a mount that
    is read-only; root may start processes in spite of the limit; prctl and a user namespace undo the end with the
    parent, and the latter can mount memory to write to; System V's memory is not part of the address space; keys of the
    user's session can be read.
    """
    processor, numbers = PROCESSORS[os.uname().machine]
    refused = [*numbers, IO_URING_SETUP, CLONE3]
    steps = [
        (LOAD, 0, 0, 4),
        (IF_EQUAL, 1, 0, processor),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        (IF_AT_LEAST, len(refused) + 1, 0, OTHER_ABI),
    ]
    steps += [(IF_EQUAL, len(refused) - i, 0, number) for i, number in enumerate(refused)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    filters = b"".join(struct.pack("HBBI", *step) for step in steps)
    code = ctypes.create_string_buffer(filters, len(filters))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    _called("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def _isolate() -> None:
    """No network, no other processes, and no file that can be written.

    The caller has to fork: only its children are in the new process namespace.

    Raises:
        OSError: the system does not allow it.
    """
    if os.uname().machine not in PROCESSORS:
        raise OSError(0, f"no filter of system calls for {os.uname().machine}")
    user, group = os.getuid(), os.getgid()
    _called("unshare", NEW_NAMESPACES)
    for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with Path(f"/proc/self/{name}").open("w") as file:
            file.write(content)
    _called("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    _called("syscall", SYS_MOUNT_SETATTR, -1, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.c_size_t(32))
    header, none = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    _called("capset", ctypes.byref(header), ctypes.byref(none))  # with capabilities it could undo all this
    _called("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _end_with_parent() -> None:
    """End when the process that started this one is killed. A change of capabilities would undo it, and a fork does."""
    if sys.platform == "linux":
        _called("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _limit(seconds: int, memory: int) -> None:
    limits = {"CPU": seconds, "AS": memory, "FSIZE": FILE, "CORE": 0, "NOFILE": 32, "NPROC": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _run(work: dict[str, Any], token: bytes, result: int, nowhere: int) -> None:
    """Run code and tests, then write the token. Whatever ends the process before that is a failure."""
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _limit(work["seconds"], work["memory"])
    if work["sandbox"]:
        _refuse_calls()
    names = {"__name__": "answer"}
    exec(compile(work["code"], "answer.py", "exec"), names)
    exec(compile(work["tests"], "tests.py", "exec"), names)
    os.write(result, token)


def _has_written(child: int, token: bytes, source: int, wait: int) -> bool:
    """Whether a child wrote the token, and nothing else, before it ended or was killed."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(wait)
    os.waitpid(child, 0)
    signal.alarm(0)
    os.set_blocking(source, False)  # what the child started may keep the other end open
    try:
        return os.read(source, len(token) + 1) == token
    except BlockingIOError:
        return False


def main() -> int:
    work, nowhere = json.load(sys.stdin), os.open(os.devnull, os.O_RDWR)
    try:
        if work["sandbox"]:
            _isolate()
    except OSError as error:
        print(error.strerror or error, flush=True)
        return UNABLE
    _end_with_parent()
    for stream in (0, 1):  # the child can open those of this process, through /proc
        os.dup2(nowhere, stream)
    token, (source, result) = os.urandom(16), os.pipe()
    if child := os.fork():
        os.close(result)
        return PASSED if _has_written(child, token, source, work["wait"]) else FAILED
    _end_with_parent()
    try:
        os.close(source)
        _run(work, token, result, nowhere)
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
