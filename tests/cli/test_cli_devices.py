"""The commands for boards over a real sshd on loopback; only what the agent answers is made up."""

from __future__ import annotations

import getpass
import io
import json
import os
import pty
import select
import shutil
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakeagent
import pytest
import yaml
from sshd import Sshd, free_port, keygen, script, serve

from edgeprune.cli import devices as cli_devices
from edgeprune.cli import main as cli
from edgeprune.cli.devices import RUNTIMES
from edgeprune.devices.inventory import quarantine
from edgeprune.devices.inventory.proposals import parse_address, targets_for
from edgeprune.devices.link import replies
from edgeprune.devices.setup import checkup
from edgeprune.errors import SpecError
from edgeprune.records import catalog
from edgeprune.records.device import Device

NO_KEY = "SHA256:" + "A" * 43
ANSI = "\x1b[31mred\x1b[0m\x07\u202e"
HELLO = {
    **fakeagent.HELLO,
    "kernel": "6.6.31",
    "boot_id": "01234567-89ab-cdef-0123-456789abcdef",
    "wall_clock_ns": 0,  # the agent puts in what time it is
}
OWNER = {
    "user": "anna",
    "host": "laptop",
    "pid": 4711,
    "job": "deploy",
    "since_s": 720.0,
    "session": "s1",
}
STATUS = {
    "lease_file": "/run/lock/edgeprune.lock",
    "owner": None,
    "mine": False,
    "workdir": "/home/pi/.local/share/edgeprune",
    "disk_free_bytes": 20 * 1024**3,
    "cache_bytes": 5 * 1024**2,
    "environments": [
        {"name": "litert-2.3.0-0a1b2c3d", "runtime": "litert", "version": "2.3.0", "bytes": 10**8}
    ],
    "telemetry": {
        "governor": "ondemand",
        "temperature_c": 48.5,
        "temperature_limit_c": 85.0,
        "clock_hz": 1_500_000_000,
        "clock_limit_hz": 1_500_000_000,
        "throttled": False,
        "available_memory_bytes": 3 * 1024**3,
    },
    "workdir_problem": None,
    "tuned": False,
}
ANSWERS: dict[str, Any] = {
    "hello": HELLO,
    "lease": {"lease_file": "/run/lock/edgeprune.lock"},
    "bye": {},
    "status": STATUS,
    "runtime litert": {"version": "2.3.0"},
    "who": {"owner": None},
    "break": {"owner": OWNER, "ended": True},
    "clean": {"freed_bytes": 3 * 1024**2, "kept_bytes": 0},
    "restore": {"restored": ["cpu0 governor: ondemand"]},
}
AGENT = f"""#!{sys.executable}
import json, pathlib, struct, sys, time
out, source = sys.stdout.buffer, sys.stdin.buffer
here = pathlib.Path(__file__).parent
out.write(b"\\0edgeprune-agent/2\\n"); out.flush()
while True:
    size = source.read(4)
    if not size:
        break
    request = json.loads(source.read(struct.unpack(">I", size)[0]))
    source.read(struct.unpack(">Q", source.read(8))[0])
    op = request["op"]
    if op == "beat":
        continue
    with open(here / "asked", "a") as log:
        log.write(json.dumps(request) + "\\n")
    answers = json.loads((here / "answers.json").read_text())
    found = answers.get(op + " " + request["name"] if op == "runtime" else op)
    if isinstance(found, list):  # one for each time it is asked; the last one stays
        left = found[1:] or found
        (here / "answers.json").write_text(json.dumps(dict(answers, **{{op: left}})))
        found = found[0]
    if op == "hello" and found and found.get("wall_clock_ns") == 0:
        found["wall_clock_ns"] = time.time_ns()
    if found is None:
        reply = {{"ok": False, "kind": "runtime", "error": "No module named " + str(request.get("name"))}}
    else:
        reply = dict(found, ok=True)
    text = json.dumps(dict(reply, id=request["id"])).encode()
    out.write(struct.pack(">I", len(text)) + text + struct.pack(">Q", 0))
    out.flush()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


class Desk:
    """A project folder, a board that is reached over the server, and what its agent answers."""

    def __init__(self, folder: Path, server: Sshd) -> None:
        self.folder, self.server = folder, server
        self.file = folder / "devices.yaml"
        self.board = folder / "board"
        self.board.mkdir()
        self.python = script(self.board / "fake-python", AGENT)
        self.answer()

    def answer(self, **changes: Any) -> None:
        """Change what the agent answers; ``None`` for a refusal."""
        answers = {**ANSWERS, **{k.replace("__", " "): v for k, v in changes.items()}}
        (self.board / "answers.json").write_text(json.dumps(answers))

    def asked(self) -> list[dict[str, Any]]:
        log = self.board / "asked"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def flags(self, **changes: str | None) -> list[str]:
        """What ``devices add`` needs to reach the board."""
        facts = {
            "key": str(self.server.folder / "login"),
            "fingerprint": self.server.fingerprint,
            "python": self.python,
            "workdir": str(self.board / "work"),
            **changes,
        }
        return [x for k, v in facts.items() if v is not None for x in (f"--{k}", v)]

    def address(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1:{self.server.port}"

    def write(self, **changes: Any) -> None:
        """The board as ``pi-desk`` in devices.yaml; with ``transport="local"`` it is reached without a login, which is faster."""
        device = self.server.device(
            python=self.python, workdir=str(self.board / "work"), targets=("rpi4",), **changes
        )
        entry = device.model_dump(mode="json", exclude_none=True)
        self.file.write_text(
            yaml.safe_dump({"schema_version": 1, "devices": {"pi-desk": entry}}, sort_keys=False)
        )


@pytest.fixture
def desk(tmp_path: Path, server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal
    return Desk(tmp_path, server)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit code, stdout, stderr."""

    def go(*args: str) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(["devices", *args])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return go


# Adding, re-keying and removing


def test_a_board_is_added_with_the_target_that_it_looks_like(desk, run):
    code, out, err = run("add", "pi-desk", desk.address(), *desk.flags())
    assert (code, err) == (0, "")
    assert "Raspberry Pi 4 Model B Rev 1.4, aarch64, 4 cores, 4 GiB, 64-bit" in out
    assert out.splitlines()[-1].endswith("edgeprune devices setup pi-desk")
    added = catalog.device("pi-desk")
    assert added.targets == ("rpi4",)
    assert added.host_key.sha256 == desk.server.fingerprint
    assert (added.python, added.port, added.stand_in) == (desk.python, desk.server.port, False)
    assert {request["op"] for request in desk.asked()} == {"hello", "bye"}  # and no lease


def test_a_board_joins_the_others_and_their_text_stays(desk, run):
    text = "# mine\nschema_version: 1\ndevices:\n  a: {transport: local, targets: []} # here\n\n# end\n"
    desk.file.write_text(text)
    desk.file.chmod(0o600)
    code, _, _ = run("add", "pi-desk", desk.address(), *desk.flags(), "--target", "rpi5")
    assert code == 0
    kept = [line for line in text.splitlines() if line in desk.file.read_text().splitlines()]
    assert kept == text.splitlines()
    assert stat.S_IMODE(desk.file.stat().st_mode) == 0o600
    assert catalog.device("pi-desk").targets == ("rpi5",)
    code, out, _ = run("remove", "pi-desk")
    assert (code, out) == (0, "removed pi-desk from devices.yaml\n")
    assert desk.file.read_text() == text


def test_the_file_can_be_named(desk, run):
    code, out, _ = run(
        "add", "pi-desk", desk.address(), *desk.flags(), "--file", "other.yaml", "--stand-in"
    )
    assert code == 0
    assert "edgeprune reads ./devices.yaml" in out
    assert not desk.file.exists()
    assert catalog.devices(Path("other.yaml"))["pi-desk"].stand_in
    assert run("remove", "pi-desk")[0] == 2
    assert run("remove", "pi-desk", "--file", "other.yaml")[0] == 0


def test_the_file_of_the_user_is_taken_where_the_folder_has_none(desk, run, user_config):
    user_config.mkdir()
    (user_config / "devices.yaml").write_text("schema_version: 1\ndevices: {}\n")
    assert run("add", "pi-desk", desk.address(), *desk.flags())[0] == 0
    assert not desk.file.exists()
    assert "pi-desk" in (user_config / "devices.yaml").read_text()


def test_the_usual_key_is_taken_where_there_is_one(desk, run):
    ssh = desk.folder / "home" / ".ssh"
    ssh.mkdir(parents=True)
    shutil.copy(desk.server.folder / "login", ssh / "id_ed25519")
    assert run("add", "pi-desk", desk.address(), *desk.flags(key=None))[0] == 0
    assert catalog.device("pi-desk").auth.key_file == "~/.ssh/id_ed25519"


def test_a_server_without_an_ed25519_key_is_pinned_by_the_kind_that_it_has(desk, run, tmp_path):
    for kind in ("ecdsa", "rsa"):
        folder = tmp_path / kind
        folder.mkdir()
        host_key = folder / f"host_{kind}"
        command = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(host_key)]
        subprocess.run(command, check=True)
        command = ["ssh-keygen", "-lf", str(host_key)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        # The first line of a keyword wins for algorithms: the server's own ed25519 key is never offered.
        offered = "ecdsa-sha2-nistp256" if kind == "ecdsa" else "rsa-sha2-512,rsa-sha2-256"
        extra = (f"HostKey {host_key}", f"HostKeyAlgorithms {offered}")
        with serve(folder, *extra) as server:
            desk.server = server
            code, out, err = run(
                "add", f"b-{kind}", desk.address(), *desk.flags(fingerprint=shown[1])
            )
            assert (code, err) == (0, ""), out
        pinned = catalog.device(f"b-{kind}").host_key
        assert pinned.sha256 == shown[1]
        assert pinned.key_type == {"ecdsa": "ecdsa-sha2-nistp256", "rsa": "ssh-rsa"}[kind]


WRONG = {
    "bad name": (["Pi Desk", "pi@127.0.0.1"], 2, "a device's name must be"),
    "own name": (["this-machine", "pi@127.0.0.1"], 2, "is taken"),
    "address": (["pi-desk", "pi@127.0.0.1/x"], 2, "an address must look like"),
    "user": (["pi-desk", "Pi;x@127.0.0.1"], 2, "user in the entry 'pi-desk'"),
    "two ports": (["pi-desk", "pi@127.0.0.1:22", "--port", "23"], 2, "--port is 23"),
    "two keys": (
        ["pi-desk", "pi@127.0.0.1", "--agent-key", NO_KEY],
        2,
        "--key and --agent-key",
    ),
    "target": (["pi-desk", "pi@127.0.0.1", "--target", "rpi-4"], 2, "did you mean 'rpi4'"),
    "unknown host": (["pi-desk", "pi@no-such-host.invalid"], 4, "cannot be reached"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_typed_wrong_is_one_line_and_writes_nothing(desk, run, wrong):
    args, code, says = WRONG[wrong]
    found, out, err = run("add", *args, *desk.flags())
    assert (found, out) == (code, "")
    assert says in err
    assert len(err.splitlines()) <= 2
    assert not desk.file.exists()
    assert desk.asked() == []


def test_a_password_in_place_of_its_reference_is_not_repeated(desk, run):
    flags = [*desk.flags(key=None), "--password-ref", "canary-7f3a91"]
    code, out, err = run("add", "pi-desk", desk.address(), *flags)
    assert code == 2
    assert "password_ref" in err
    assert "canary" not in out + err


def test_a_closed_port_is_unreachable_and_writes_nothing(desk, run):
    code, _, err = run("add", "pi-desk", f"127.0.0.1:{free_port()}", *desk.flags())
    assert code == 4
    assert "cannot be reached" in err
    assert not desk.file.exists()


def test_another_fingerprint_is_refused_before_any_login(tmp_path, desk, run):
    folder = tmp_path / "fresh"
    folder.mkdir()
    with serve(folder) as server:
        desk.server = server
        code, out, err = run("add", "pi-desk", desk.address(), *desk.flags(fingerprint=NO_KEY))
        assert "userauth-request" not in server.log()
    assert (code, out) == (4, "")
    assert server.fingerprint in err
    assert NO_KEY in err
    assert not desk.file.exists()


def test_a_name_that_exists_is_kept_and_the_board_is_not_asked(desk, run):
    desk.write()
    before = desk.file.read_bytes()
    code, _, err = run("add", "pi-desk", desk.address(), *desk.flags())
    assert code == 2
    assert "exists already" in err
    assert desk.file.read_bytes() == before
    assert desk.asked() == []


def test_without_a_key_the_error_says_what_to_give(desk, run):
    code, _, err = run("add", "pi-desk", desk.address(), *desk.flags(key=None))
    assert code == 2
    for flag in ("--key", "--agent-key", "--password-ref"):
        assert flag in err


def test_without_a_terminal_the_fingerprint_must_be_given(desk, run):
    code, _, err = run("add", "pi-desk", desk.address(), *desk.flags(fingerprint=None), "--yes")
    assert code == 2
    assert "--fingerprint" in err
    assert "ssh-keygen -lf" in err


def test_a_refused_login_writes_nothing(desk, run, tmp_path):
    keygen(tmp_path / "wrong")
    code, _, err = run("add", "pi-desk", desk.address(), *desk.flags(key=str(tmp_path / "wrong")))
    assert code == 4
    assert "login refused" in err
    assert not desk.file.exists()


@pytest.mark.parametrize(
    "hello", [None, {**HELLO, "bits": 16}, {**HELLO, "wall_clock_ns": -1}, {"machine": "aarch64"}]
)
def test_a_board_that_answers_nonsense_is_not_added(desk, run, hello):
    desk.answer(hello=hello)
    code, _, _ = run("add", "pi-desk", desk.address(), *desk.flags())
    assert code == 4
    assert not desk.file.exists()


def on_terminal(cwd: Path, *args: str, answers: tuple[tuple[str, str], ...]) -> tuple[int, str]:
    """Run a command on a terminal of its own, typing each answer once its question stands there; exit code and all that was shown."""
    master, slave = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "TERM": "dumb"}
    command = [sys.executable, "-m", "edgeprune", "devices", *args]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown, waiting = "", list(answers)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if waiting and waiting[0][0] in shown:
            os.write(master, waiting.pop(0)[1].encode() + b"\n")
        if select.select([master], [], [], 0.2)[0]:
            try:
                shown += os.read(master, 65536).decode()
            except OSError:  # the other end is closed
                break
    os.close(master)
    return process.wait(10), shown.replace("\r\n", "\n")


def test_on_a_terminal_the_fingerprint_is_shown_and_asked_for(desk):
    answers = (("the same?", "y"), ("targets it can time", "rpi4, rpi5"))
    flags = desk.flags(fingerprint=None)
    code, shown = on_terminal(
        desk.folder, "add", "pi-desk", desk.address(), *flags, answers=answers
    )
    assert code == 0, shown
    assert desk.server.fingerprint in shown
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in shown
    assert catalog.device("pi-desk").targets == ("rpi4", "rpi5")


def test_a_fingerprint_that_is_not_confirmed_ends_it_even_with_yes(desk):
    flags = [*desk.flags(fingerprint=None), "--yes"]
    code, shown = on_terminal(
        desk.folder, "add", "pi-desk", desk.address(), *flags, answers=(("the same?", ""),)
    )
    assert code == 4, shown
    assert "was not confirmed" in shown
    assert not desk.file.exists()
    assert desk.asked() == []


def test_a_new_host_key_is_pinned_only_for_the_old_one_and_only_as_shown(desk, run):
    desk.write(host_key={"sha256": NO_KEY})
    before = desk.file.read_text()
    shown = desk.server.fingerprint
    assert run("who", "pi-desk")[0] == 4
    code, _, err = run("rekey", "pi-desk", "--old", shown, "--new", shown)
    assert (code, "--old" in err) == (2, True)
    code, _, err = run("rekey", "pi-desk", "--old", NO_KEY, "--new", NO_KEY)
    assert (code, shown in err) == (4, True)
    assert desk.file.read_text() == before
    code, out, _ = run("rekey", "pi-desk", "--old", NO_KEY, "--new", shown)
    assert code == 0
    assert shown in out
    assert desk.file.read_text() == before.replace(NO_KEY, shown)
    assert run("who", "pi-desk")[0] == 0


def test_unknown_names_are_told_with_the_nearest_one(desk, run):
    desk.write()
    for args in (
        ["remove", "pi-dsk"],
        ["check", "pi-dsk"],
        ["who", "pi-dsk"],
        ["rekey", "pi-dsk", "--old", NO_KEY, "--new", NO_KEY],
    ):
        code, _, err = run(*args)
        assert code == 2
        assert "did you mean 'pi-desk'" in err


def test_this_machine_is_no_entry_that_could_be_removed(desk, run):
    code, _, err = run("remove", "this-machine")
    assert code == 2
    assert "unknown device" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pi.local", (None, "pi.local", 22)),
        ("pi@pi.local:2222", ("pi", "pi.local", 2222)),
        ("pi@[2001:db8::7]:23", ("pi", "2001:db8::7", 23)),
        ("2001:db8::7", (None, "2001:db8::7", 22)),
        ("fe80::1%eth0", (None, "fe80::1%eth0", 22)),
    ],
)
def test_addresses_are_read(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "@pi", "pi@", "pi:x", "a b", "pi:22:23x", "$(id)", "pi\n"])
def test_other_addresses_are_refused(text):
    with pytest.raises(SpecError, match="address"):
        parse_address(text)


@pytest.mark.parametrize(
    ("model", "bits", "targets"),
    [
        ("Raspberry Pi 4 Model B Rev 1.4", 64, ("rpi4",)),
        ("Raspberry Pi Compute Module 4 Rev 1.0", 64, ("rpi4",)),
        ("Raspberry Pi 5 Model B Rev 1.0", 64, ("rpi5",)),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", 32, ("rpi3-32bit",)),
        ("Raspberry Pi 4 Model B Rev 1.4", 32, ()),
        ("NVIDIA Jetson Orin Nano Developer Kit", 64, ("jetson-orin-nano",)),
        ("Radxa ROCK 5B", 64, ()),
    ],
)
def test_targets_are_proposed_by_the_model_of_the_board(model, bits, targets):
    hello = replies.Hello.model_validate_json(
        json.dumps({**HELLO, "cpu_model": model, "bits": bits})
    )
    assert targets_for(hello) == targets
    assert set(targets) <= set(catalog.targets())


# Looking at boards


def test_devices_are_listed_with_their_stamp_and_pin(desk, run):
    desk.write()
    found = json.loads(run("list", "--json")[1])
    assert found["pi-desk"]["stamp"] == "stand-in"
    assert (found["pi-desk"]["pinned"], found["this-machine"]["pinned"]) == ("yes", "no")
    code, out, _ = run("list")
    assert code == 0
    head, *rows = out.splitlines()
    assert head.split() == ["name", "transport", "address", "stamp", "pinned", "trusted", "targets"]
    assert [row.split()[0] for row in rows] == ["pi-desk", "this-machine"]
    assert head.index("stamp") == rows[0].index("stand-in")


def test_this_machine_needs_litert_for_files_of_the_older_runtime():
    local = Device(transport="local", targets=("rpi3-32bit", "rpi4"))
    assert cli_devices._runtimes_of(local) == ["litert"]
    board = local.model_copy(update={"transport": "ssh"})
    assert cli_devices._runtimes_of(board) == ["tflite-runtime", "litert"]


@pytest.mark.parametrize("command", ["check", "setup", "who", "wait", "break", "clean", "restore"])
def test_a_recording_is_no_board_to_look_after(desk, run, command):
    desk.file.write_text(
        "schema_version: 1\ndevices:\n  old:\n    transport: replay\n    recording: old.epr\n    targets: [rpi4]\n"
    )
    code, out, err = run(command, "old")
    assert (code, out) == (2, "")
    assert err.startswith("error: 'old' is a recording and no board")


def test_a_board_in_quarantine_is_listed_so_and_leaves_it_by_a_good_check_up(desk, run):
    desk.write(transport="local")
    quarantine.put("pi-desk", "its times scatter")
    try:
        assert "its times scatter" in json.loads(run("list", "--json")[1])["pi-desk"]["trusted"]
        desk.answer(runtime__litert=None)
        assert run("check", "pi-desk")[0] == 4
        assert quarantine.reason("pi-desk") == "its times scatter"
        desk.answer()
        assert "out of quarantine" in run("check", "pi-desk")[1]
        assert quarantine.reason("pi-desk") is None
    finally:
        quarantine.lift("pi-desk")


def test_a_sound_board_passes_its_check_up(desk, run):
    desk.write()
    code, out, err = run("check", "pi-desk")
    assert (code, err) == (0, "")
    lines = dict(
        line[6:].split(maxsplit=1)
        for line in out.splitlines()
        if line[:4].strip() in ("ok", "warn")
    )
    assert {"cpu", "isa", "memory", "governor", "disk", "lease", "workdir", "stamp"} <= set(lines)
    assert "dotprod no" in lines["isa"]
    assert "48.5 C" in lines["temperature"]
    assert "1500 MHz" in lines["clock"]
    assert "litert-2.3.0-0a1b2c3d" in lines["environments"]
    assert "free" in lines["lease"]


def test_a_check_up_as_json_has_the_answers_of_the_board(desk, run):
    desk.write()
    code, out, _ = run("check", "pi-desk", "--json")
    found = checkup.Checkup.model_validate_json(out)
    assert (code, found.ok) == (0, True)
    assert found.hello.cpu_model == HELLO["cpu_model"]
    assert abs(found.clock_offset_s) < 5
    by_name = {r.name: r for r in found.runtimes}
    assert by_name["litert"].version == "2.3.0"
    assert by_name["onnxruntime"].problem == "No module named onnxruntime"


CHANGES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "old cpu": ({"hello": {"machine": "armv6l", "bits": 32}}, "fail", "cpu", "armv6l", "ARMv7"),
    "32 bits": ({"hello": {"machine": "armv7l", "bits": 32}}, "warn", "cpu", "32-bit", "tflite"),
    "emulated": ({"hello": {"emulated": True}}, "warn", "stamp", "emulated", "real board"),
    "pages": ({"hello": {"page_size_bytes": 16384}}, "warn", "page size", "16 KiB", "kernel8.img"),
    "musl": ({"hello": {"glibc": None}}, "warn", "system", "glibc none", "glibc"),
    "clock": ({"hello": {"wall_clock_ns": 10**9}}, "warn", "wall clock", "stay right", "set-ntp"),
    "governor": ({}, "warn", "governor", "ondemand", "tuning"),
    "warm": ({"telemetry": {"temperature_c": 65.0}}, "warn", "temperature", "65.0 C", "cool"),
    "hot": ({"telemetry": {"temperature_c": 82.0}}, "fail", "temperature", "82.0 C", "fan"),
    "supply": (
        {"telemetry": {"throttled": True, "throttle": ["under-voltage"]}},
        "fail", "throttle", "under-voltage", "supply",
    ),
    "was hot": (
        {"telemetry": {"throttle_seen": ["soft-limit"]}},
        "warn", "throttle", "soft-limit", "cool",
    ),
    "memory": (
        {"telemetry": {"available_memory_bytes": 10**8}},
        "warn", "memory", "95 MiB available", "end other",
    ),
    "no runtime": ({"runtime": None}, "fail", "runtime litert", "No module", "devices setup pi-desk"),
    "full disk": ({"status": {"disk_free_bytes": 10**6}}, "fail", "disk", "free", "devices clean"),
    "noexec": (
        {"status": {"workdir_problem": "does not allow programs to run (noexec)"}},
        "fail", "workdir", "noexec", "set workdir",
    ),
    "held": ({"status": {"owner": OWNER}}, "warn", "lease", "anna@laptop", "devices wait pi-desk"),
    "left tuned": ({"status": {"tuned": True}}, "warn", "lease", "not put back", "devices restore"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_wrong_with_a_board_is_told_with_the_next_step(desk, run, change):
    changes, level, name, says, advice = CHANGES[change]
    telemetry = {**STATUS["telemetry"], **changes.get("telemetry", {})}
    desk.answer(
        hello={**HELLO, **changes.get("hello", {})},
        status={**STATUS, **changes.get("status", {}), "telemetry": telemetry},
        runtime__litert=changes.get("runtime", ANSWERS["runtime litert"]),
    )
    desk.write(transport="local")
    code, out, err = run("check", "pi-desk", "--json")
    findings = [f for f in checkup.Checkup.model_validate_json(out).findings if f.name == name]
    assert [f.level for f in findings] == [level]
    assert says in findings[0].text
    assert advice in str(findings[0].next_step)
    assert code == (4 if level == "fail" else 0)
    assert (name in err) == (level == "fail")


def test_what_one_may_need_to_do_is_shown_under_the_line(desk, run):
    desk.answer(runtime__litert=None)
    desk.write()
    code, out, err = run("check", "pi-desk")
    lines = out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("fail  runtime litert "))
    assert lines[at + 1].strip() == "-> edgeprune devices setup pi-desk --runtime litert"
    assert code == 4
    assert err.splitlines()[0].startswith("error: device 'pi-desk' cannot be measured as it is")


def test_no_escape_code_of_a_board_reaches_the_terminal(desk, run):
    spoiled = {**OWNER, "user": ANSI, "job": ANSI, "host": ANSI}
    desk.answer(
        hello={**HELLO, "cpu_model": ANSI + HELLO["cpu_model"], "kernel": ANSI, "user": ANSI},
        status={**STATUS, "owner": spoiled, "workdir": ANSI, "workdir_problem": ANSI},
        who={"owner": spoiled},
        restore={"restored": [ANSI]},
        **{"break": {"owner": spoiled, "ended": False}},
    )
    shown = "".join(run("add", "spoiled", desk.address(), *desk.flags())[1:])
    desk.write(transport="local")
    for args in (["check"], ["check", "--json"], ["who"], ["who", "--json"], ["restore"]):
        shown += "".join(run(args[0], "pi-desk", *args[1:])[1:])
    shown += "".join(run("break", "pi-desk", "--yes")[1:])
    shown += "".join(run("wait", "pi-desk", "--timeout", "0s")[1:])
    assert "red" in shown
    assert not set("\x1b\x07\u202e") & set(shown)


def test_an_unreachable_board_fails_with_its_address(desk, run):
    desk.write(port=free_port())
    code, out, err = run("check", "pi-desk", "--json")
    assert (code, out) == (4, "")
    assert "cannot be reached" in err


# Sharing a board


def test_who_holds_a_board_is_told(desk, run):
    desk.write(transport="local")
    assert run("who", "pi-desk")[:2] == (0, "pi-desk is free\n")
    desk.answer(who={"owner": OWNER})
    assert "anna@laptop (pid 4711), deploy, for 12 min" in run("who", "pi-desk")[1]
    assert json.loads(run("who", "pi-desk", "--json")[1])["owner"]["session"] == "s1"


def test_waiting_ends_when_the_board_is_free(desk, run):
    desk.write()
    desk.answer(who=[{"owner": OWNER}, {"owner": None}])
    code, out, _ = run("wait", "pi-desk", "--timeout", "1min")
    assert (code, out) == (0, "pi-desk is free\n")
    assert [r["op"] for r in desk.asked()] == ["hello", "who", "who", "bye"]


def test_waiting_too_long_is_exit_code_75(desk, run):
    desk.write(transport="local")
    desk.answer(who={"owner": OWNER})
    code, _, err = run("wait", "pi-desk", "--timeout", "0.3s")
    assert code == 75
    assert "anna@laptop" in err


@pytest.mark.parametrize("timeout", ["10", "-1s", "1 day", "1e3s", "infs"])
def test_a_timeout_needs_its_unit(desk, run, timeout):
    desk.write()
    code, _, err = run("wait", "pi-desk", f"--timeout={timeout}")
    assert code == 2
    assert "90s, 10min or 2h" in err
    assert desk.asked() == []


def test_a_lease_is_broken_only_when_asked_for_twice(desk, run):
    desk.write(transport="local")
    assert "nothing to end" in run("break", "pi-desk", "--yes")[1]
    desk.answer(who={"owner": OWNER})
    code, _, err = run("break", "pi-desk")
    assert code == 2
    assert "--yes" in err
    assert "break" not in [request["op"] for request in desk.asked()]
    assert run("break", "pi-desk", "--yes")[:2] == (0, "ended; pi-desk is free\n")
    desk.answer(who={"owner": OWNER}, **{"break": {"owner": OWNER, "ended": False}})
    code, _, err = run("break", "pi-desk", "--yes")
    assert code == 4
    assert "same user" in err


def test_a_board_is_cleaned_and_put_back(desk, run):
    desk.write(transport="local")
    assert run("clean", "pi-desk")[:2] == (0, "freed 3 MiB, kept 0 B on pi-desk\n")
    run("clean", "pi-desk", "--all")
    assert [r["all"] for r in desk.asked() if r["op"] == "clean"] == [False, True]
    assert run("restore", "pi-desk")[:2] == (0, "put back cpu0 governor: ondemand\n")
    desk.answer(restore={"restored": []})
    assert run("restore", "pi-desk")[1] == "nothing to put back on pi-desk\n"


# Setting a board up


@pytest.fixture
def provisioned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the module that sets boards up."""
    calls: list[Any] = []

    def setup(board: Any, runtimes: Any, *, progress: Any, wheels: Any) -> Any:
        calls.append((board.name, list(runtimes), wheels))
        refused = {"version": None, "status": "refused", "reason": "no wheel " + ANSI}
        installed = {"version": "2.3.0", "status": "installed", "reason": ANSI}
        lines = [
            types.SimpleNamespace(runtime=r, **(refused if r == "tflite-runtime" else installed))
            for r in runtimes
        ]
        return types.SimpleNamespace(
            runtimes=lines, bytes_sent=2048, seconds={"send": 1.0, "install": 2.5}
        )

    module = types.ModuleType("edgeprune.devices.setup.provision")
    module.setup = setup  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_a_board_is_set_up_with_what_its_targets_need(desk, run, provisioned, tmp_path):
    desk.write(transport="local")
    code, out, _ = run("setup", "pi-desk")
    assert code == 0
    assert "installed" in out
    assert "\x1b" not in out
    assert "sent 2 KiB in 3.5 s; next: edgeprune devices check pi-desk" in out
    run("setup", "pi-desk", "--runtime", "onnxruntime", "--wheels", str(tmp_path))
    assert provisioned == [
        ("pi-desk", ["litert"], None),
        ("pi-desk", ["onnxruntime"], tmp_path),
    ]


def test_a_runtime_that_the_board_cannot_have_is_exit_code_4(desk, run, provisioned):
    desk.write(transport="local")
    flags = ("--runtime", "litert", "--runtime", "tflite-runtime")
    code, out, err = run("setup", "pi-desk", *flags)
    assert code == 4
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["litert", "tflite-runtime"]
    assert "cannot run tflite-runtime: no wheel" in err
    assert "\x1b" not in out + err


def test_a_board_without_targets_needs_a_runtime_to_be_named(desk, run, provisioned):
    desk.write(transport="local")
    desk.file.write_text(desk.file.read_text().replace("- rpi4", "- iphone"))
    code, _, err = run("setup", "pi-desk")
    assert code == 2
    assert "--runtime" in err
    assert run("setup", "pi-desk", "--runtime", "tensorrt")[0] == 2
    assert provisioned == []


# Staying light


def test_the_runtimes_are_named_alike_everywhere():
    assert RUNTIMES == checkup.RUNTIMES


def test_commands_for_boards_import_no_heavy_toolchain(desk):
    desk.write()
    code = """
import sys
from edgeprune.cli import devices, main as cli
for args in (["list"], ["check", "pi-desk"], ["remove", "pi-desk"]):
    try:
        cli.main(["devices", *args])
    except SystemExit as stop:
        assert not stop.code, stop.code
heavy = {"torch", "onnx", "onnxruntime", "torch_pruning", "litert_torch"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=desk.folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_device_record_of_a_board_holds_no_secret():
    assert not {field for field in Device.model_fields if "password" in field or "secret" in field}
