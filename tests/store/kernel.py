"""Real file systems that misbehave, made by the kernel for one child process: full, read-only, without locks."""

import ctypes
import multiprocessing
import os
import platform
import struct
import subprocess
import sys
import traceback

import pytest

fork = multiprocessing.get_context("fork")
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_REC_PRIVATE = 0x4000 | 0x40000
_NOT_POSSIBLE = 77


def in_child(work, *arguments):
    """Run something in a forked process; an assertion that fails there fails here."""
    here, there = fork.Pipe(duplex=False)

    def child():
        try:
            there.send((0, work(*arguments)))
        except _NotPossibleError as error:
            there.send((_NOT_POSSIBLE, str(error)))
        except BaseException:
            there.send((1, traceback.format_exc()))

    process = fork.Process(target=child)
    process.start()
    process.join()
    code, answer = here.recv() if here.poll() else (1, f"died with {process.exitcode}")
    if code == _NOT_POSSIBLE:
        pytest.skip(answer)
    assert code == 0, answer
    return answer


class _NotPossibleError(Exception):
    """What the machine does not allow."""


def _libc_call(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise _NotPossibleError(f"needs {name}, which is not allowed here: {reason}")


def own_mounts():
    """Give this process mounts of its own; they vanish with it."""
    if sys.platform != "linux":
        raise _NotPossibleError("needs Linux")
    try:
        _libc_call("unshare", _NEWNS)
    except _NotPossibleError:
        _libc_call("unshare", _NEWNS | _NEWUSER)
    _libc_call("mount", b"none", b"/", None, _REC_PRIVATE, None)


def mount_small(folder, size):
    """Mount an empty file system of some bytes in memory."""
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))


def make_read_only(folder):
    """Let nobody write to a folder, the system's administrator included."""
    _mount("--bind", str(folder), str(folder))
    _mount("-o", "remount,bind,ro", str(folder))


def _mount(*arguments):
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise _NotPossibleError(f"needs mount, which is not allowed here: {done.stderr.strip()}")


def refuse_locks():
    """Let the kernel answer ENOLCK to every lock, as some network file systems do.

    A seccomp filter of this process: fcntl with a command that locks fails.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise _NotPossibleError("needs Linux on x86-64")
    # Offsets in struct seccomp_data: the call's number at 0, its second argument at 24.
    load, equal, answer = 0x20, 0x15, 0x06
    allow, no_lock = 0x7FFF0000, 0x00050000 | 37
    fcntl, commands = 72, (5, 6, 7, 36, 37, 38)  # F_GETLK, F_SETLK, F_SETLKW and their OFD kin
    program = [(load, 0, 0, 0), (equal, 0, len(commands) + 1, fcntl), (load, 0, 0, 24)]
    for index, command in enumerate(commands):
        program.append((equal, len(commands) - index, 0, command))
    program += [(answer, 0, 0, allow), (answer, 0, 0, no_lock)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _libc_call("prctl", 38, 1, 0, 0, 0)  # no new privileges
    _libc_call("prctl", 22, 2, ctypes.create_string_buffer(header), 0, 0)  # seccomp, filter
