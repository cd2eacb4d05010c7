"""Durable writes: whole or not at all, one line for what the disk refuses, and a lock that says whose it is."""

import errno
import os
import platform
import signal
import subprocess
import sys

import pytest

from yuriiformer import files
from yuriiformer.errors import EnvironmentFault, UserError
from yuriiformer.files import append_line, lock, locked_by, new_folder, remove_folder, write_bytes, write_text

HOLD = """
import sys, time
from pathlib import Path
from yuriiformer.files import lock
with lock(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_says_whose_it_is_and_is_never_stale(tmp_path):
    assert locked_by(tmp_path) is None
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    who = f"process {holder.pid} on {platform.node()}"
    assert locked_by(tmp_path) == who
    with pytest.raises(UserError, match=rf"run {tmp_path} is in use by {who}\."), lock(tmp_path, "run"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert locked_by(tmp_path) is None
    with lock(tmp_path, "run"):
        assert locked_by(tmp_path) == f"process {os.getpid()} on {platform.node()}"


def refusing(at, number, monkeypatch):
    """The disk refuses the call `at`; returns what has been called."""
    called = []

    def perform(call, *arguments):
        called.append(call.__name__)
        if len(called) - 1 == at:
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    monkeypatch.setattr(files, "perform", perform)
    return called


def writes(folder):
    with new_folder(folder / "new") as partial:
        write_bytes(partial / "data", b"123")
        write_text(partial / "text", "4")
    append_line(folder / "log", "line")
    write_text(folder / "state", "new")
    remove_folder(folder / "old")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
def test_every_refused_call_is_one_line_and_leaves_things_whole(tmp_path, monkeypatch, number):
    refused: list[str] = []
    count, at = 100, 0
    while at < count:
        folder = tmp_path / str(at)
        (folder / "old").mkdir(parents=True)
        (folder / "log").write_text("first\n")
        (folder / "state").write_text("old")
        called = refusing(at, number, monkeypatch)
        try:
            writes(folder)
            count = len(called)  # none was refused: these were all
        except EnvironmentFault as error:
            refused.append(str(error))
        assert (folder / "log").read_text() in ("first\n", "first\nline\n")
        assert (folder / "state").read_text() in ("old", "new")
        if (folder / "new").exists():
            assert (folder / "new" / "data").read_bytes() + (folder / "new" / "text").read_bytes() == b"1234"
        at += 1
    assert 15 < count < 40
    assert len(refused) == count
    assert all(os.strerror(number) in line and "\n" not in line for line in refused)


def test_what_is_taken_in_parts_is_written_whole(tmp_path, monkeypatch):
    def perform(call, *arguments):
        return os.write(arguments[0], arguments[1][:3]) if call is os.write else call(*arguments)

    monkeypatch.setattr(files, "perform", perform)
    write_text(tmp_path / "text", "0123456789")
    append_line(tmp_path / "text", "abcdefgh")
    assert (tmp_path / "text").read_text() == "0123456789abcdefgh\n"
