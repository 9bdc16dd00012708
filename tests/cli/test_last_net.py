"""What nobody foresaw, and output that nobody reads: one line at most, the right exit code, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tinynet
from repo import REPO

from edgeprune.cli import last_net

REPORT = ("targets", "show", "rpi4")
FAULT = (
    "import sys; from edgeprune.records import catalog; from edgeprune.cli.main import main\n"
    "def fail(*_):\n    {body}\n"
    "catalog.targets = fail\n"
    "sys.argv = ['edgeprune', 'targets', 'list', '--json']\n"
    "main()\n"
)


def failing(
    folder: Path, body: str, *, closes: str = "", **changes: str
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, in which something raises; ``closes`` are redirections of the shell."""
    changes = {"XDG_STATE_HOME": str(folder / "state"), **changes}
    code = FAULT.format(body=body)
    words = ["sh", "-c", f'exec "$0" -c "$1" {closes}', sys.executable, code]
    environment = {k: v for k, v in tinynet.environment(folder, **changes).items() if v != "-"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise KeyError('gone')", "KeyError: 'gone' (catalog.py line "),
        ("raise ValueError('first\\nsecond')", "ValueError: first ("),
        ("raise AssertionError", "AssertionError ("),
        ("raise MemoryError", "MemoryError ("),
        ("fail()", "RecursionError: maximum recursion depth exceeded"),
        ("raise UnicodeDecodeError('utf-8', b'\\xff', 0, 1, 'odd')", "UnicodeDecodeError: "),
    ],
)
def test_a_fault_of_ours_is_one_line_and_a_log(tmp_path, body, says):
    done = failing(tmp_path, body)
    assert (done.returncode, done.stdout) == (70, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: edgeprune failed where it should not: {says}")
    (log,) = (tmp_path / "state" / "edgeprune" / "errors").iterdir()
    assert hint == (f"hint: this is a fault of edgeprune; please report it with the log {log}")
    text = log.read_text()
    assert text.startswith("edgeprune targets list --json\nedgeprune ")
    assert "Traceback (most recent call last)" in text
    assert log.stat().st_mode & 0o077 == 0


def test_without_a_home_the_log_goes_where_temporary_files_go(tmp_path):
    (tmp_path / "file").write_text("")
    done = failing(
        tmp_path, "raise KeyError('gone')", XDG_STATE_HOME="/proc/none", TMPDIR=str(tmp_path)
    )
    assert done.returncode == 70
    (log,) = tmp_path.glob("edgeprune-*/edgeprune-*.log")
    assert done.stderr.splitlines()[1].endswith(f"the log {log}")


def test_without_any_place_for_a_log_the_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(last_net, "_write", refuse)

    def fail() -> None:
        raise KeyError("gone")

    with pytest.raises(SystemExit) as stop:
        last_net.caught(fail)
    assert stop.value.code == 70
    error, hint = capsys.readouterr().err.splitlines()
    assert "KeyError: 'gone'" in error
    assert "this line (no log could be written: No space left on device)" in hint


def test_a_full_disk_is_no_fault_of_ours(tmp_path):
    done = failing(tmp_path, "raise OSError(28, 'No space left on device', '/data/x')")
    assert (done.returncode, done.stderr) == (
        2, "error: no space left on the disk of /data/x\n",
    )  # fmt: skip


def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    done = shell(tmp_path, "targets list > /dev/full")
    assert (done.returncode, done.stderr) == (
        2, "error: no space left on the disk of the output\n",
    )  # fmt: skip


def shell(folder: Path, words: str, **changes: str) -> subprocess.CompletedProcess[bytes | str]:
    """The command as a shell starts it, with whatever it does to the streams."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$0" -m edgeprune {words}', sys.executable],
        capture_output=True,
        text=True,
        env=tinynet.environment(folder, **changes),
        cwd=folder,
    )


def test_a_reader_that_goes_away_ends_a_command_without_a_word(tmp_path):
    done = shell(tmp_path, "targets show rpi4 | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) in ((141, ""), (0, ""))  # 0: it wrote before
    broken = (
        "import os, sys; from edgeprune.cli.main import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "main(['targets', 'list'])\n"
    )
    sure = subprocess.run(
        [sys.executable, "-c", broken],
        capture_output=True,
        text=True,
        env=tinynet.environment(tmp_path),
    )
    assert (sure.returncode, sure.stderr) == (141, "")


def test_progress_that_nobody_reads_ends_a_command_without_a_word(tmp_path):
    broken = (
        "import os; from edgeprune.cli import main; from edgeprune.cli.progress import Terminal\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 2)\n"
        "from edgeprune.cli import last_net\n"
        "last_net.caught(lambda: Terminal().say('x'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", broken], capture_output=True, env=tinynet.environment(tmp_path)
    )
    assert (done.returncode, done.stdout) == (141, b"")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_change_no_exit_code(tmp_path, closed):
    assert shell(tmp_path, f"targets list {closed}").returncode == 0
    assert shell(tmp_path, f"targets show gone {closed}").returncode == 2


def test_a_closed_output_is_not_taken_by_the_next_file(tmp_path):
    code = (
        "from edgeprune.cli import last_net\nlast_net.ready_streams()\n"
        "import os\nwith open('file', 'w') as f: os.write(1, b'lost'); f.write('kept')\n"
    )
    words = ["sh", "-c", 'exec "$0" -c "$1" 1>&-', sys.executable, code]
    subprocess.run(words, check=True, cwd=tmp_path, env=tinynet.environment(tmp_path))
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_lacks_a_character_is_shown_its_number(tmp_path, encoding):
    folder = tmp_path / "targets"
    folder.mkdir()
    text = (REPO / "targets" / "rpi4.yaml").read_text()
    lines = [
        'summary: "5 \\u00b5s \\u2192 \\U0001F600"' if line.startswith("summary:") else line
        for line in text.splitlines()
    ]
    (folder / "rpi4.yaml").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "targets", "list", "--json"],
        capture_output=True,
        cwd=tmp_path,
        env=tinynet.environment(tmp_path, PYTHONIOENCODING=encoding),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode(encoding))["rpi4"]["summary"] == "5 µs → 😀"
    (tmp_path / "code.py").write_text(
        "from edgeprune.cli import last_net\nlast_net.ready_streams()\nprint('\\u00b5 \\u2192 \\U0001F600')\n"
    )
    shown = subprocess.run(
        [sys.executable, "code.py"],
        capture_output=True,
        cwd=tmp_path,
        check=True,
        env=tinynet.environment(tmp_path, PYTHONIOENCODING=encoding),
    )
    first = "\\u00b5" if encoding == "ascii" else "µ"
    assert shown.stdout.decode(encoding) == f"{first} \\u2192 \\ud83d\\ude00\n"
