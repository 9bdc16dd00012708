"""A governor of the board, changed while edgeprune measures and put back after. Only for boards whose entry allows it.

The old values are on disk before the first one changes, so that they are put back even after a power cut: by the agent's exit, its next
start, or ``edgeprune devices restore``, whichever comes first.

A user who may not write the governor files allows exactly that in /etc/sudoers.d, for every policy that the board has (``ls
/sys/devices/system/cpu/cpufreq``), each as a full path::

    edge ALL=(root) NOPASSWD: /usr/bin/tee /sys/devices/system/cpu/cpufreq/policy0/scaling_governor

No ``*`` in that line: in sudoers it fits blanks and slashes too, and so would let tee write any file (sudoers(5), "Wildcards").
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any, Dict, List, Optional

from . import telemetry, wire
from .machine import read_text

POLICIES = "sys/devices/system/cpu/cpufreq"
POLICY = re.compile(r"policy[0-9]{1,4}")
JOURNAL = "tuning.json"
MAX_JOURNAL_BYTES = 1 << 16
SUDO_TIMEOUT_S = 10.0


def apply(root: str, workdir: str, governor: str) -> Dict[str, Any]:
    """Set the governor of every cpufreq policy. What an earlier, interrupted change left is put back first.

    Args:
        root: where the board's file system starts.
        workdir: the folder of the journal; made if it is missing.
        governor: one that the board offers.

    Returns:
        ``governor`` and ``before``: the old governor of every policy, by name.

    Raises:
        wire.Refused: kind ``tuning`` when the board has no policies, does not offer the governor, or does not let us change it; everything
            is as it was then, or the message says what is not.
    """
    restore(root, workdir)
    if not telemetry.GOVERNOR.fullmatch(governor):
        raise wire.Refused("tuning", "a governor is named by letters and _, got %r" % governor[:40])
    before = {name: _governor(root, name) for name in _policies(root)}
    if not before:
        raise wire.Refused("tuning", "this board has no cpufreq policy to tune")
    for name, old in before.items():
        if old is None:
            raise wire.Refused("tuning", "cannot read the governor of %s" % name)
        offered = read_text(_path(root, name, "scaling_available_governors")) or governor
        if governor not in offered.split():
            words = (name, governor, offered[:200])
            raise wire.Refused("tuning", "%s does not offer the governor %s, only: %s" % words)
    if all(old == governor for old in before.values()):
        return {"governor": governor, "before": before}
    _write_journal(workdir, {"schema": 1, "governor": governor, "before": before})
    try:
        for name in before:
            _set(root, name, governor)
    except wire.Refused as error:
        raise wire.Refused("tuning", "; ".join([str(error), *_undo(root, workdir)])) from error
    return {"governor": governor, "before": before}


def restore(root: str, workdir: str) -> List[str]:
    """Put every governor back that :func:`apply` changed and forget the change; nothing to do is fine.

    A governor that is no longer the one that we set was changed by somebody else since, or by a reboot, and stays.

    Returns:
        A line for each policy that was put back or left, and for a journal that cannot be read (kept as ``tuning.json.bad``).

    Raises:
        wire.Refused: kind ``tuning`` when a governor cannot be put back; the journal stays, and the others are back.
    """
    path = os.path.join(workdir, JOURNAL)
    if not os.path.lexists(path):
        return []
    journal = _read_journal(path)
    if journal is None:
        _forget(path, keep=True)
        return ["%s cannot be read; it is kept as %s.bad" % (JOURNAL, JOURNAL)]
    done, failed = [], []
    for name, old in journal["before"].items():
        now = _governor(root, name)
        if now == old:
            continue
        if now is None:
            done.append("%s is gone; it had %s" % (name, old))
        elif now != journal["governor"]:
            done.append("%s stays at %s, which somebody else set" % (name, now))
        else:
            try:
                _set(root, name, old)
                done.append("%s back to %s" % (name, old))
            except wire.Refused as error:
                failed.append(str(error))
    if failed:
        raise wire.Refused("tuning", "not put back: " + "; ".join(failed))
    _forget(path)
    return done


def _undo(root: str, workdir: str) -> List[str]:
    """Put everything back after a change that failed half-way; a line for what could not be."""
    try:
        restore(root, workdir)
    except wire.Refused as error:
        return [str(error)]
    return []


def _policies(root: str) -> List[str]:
    paths = telemetry.found_paths(root, POLICIES + "/policy[0-9]*")
    names = [os.path.basename(path) for path in paths]
    return sorted((name for name in names if POLICY.fullmatch(name)), key=lambda n: int(n[6:]))


def _path(root: str, policy: str, name: str) -> str:
    return telemetry.below(root, POLICIES, policy, name)


def _governor(root: str, policy: str) -> Optional[str]:
    text = read_text(_path(root, policy, "scaling_governor")) or ""
    return text if telemetry.GOVERNOR.fullmatch(text) else None


def _set(root: str, policy: str, governor: str) -> None:
    """Write one governor and see that the kernel took it."""
    path = _path(root, policy, "scaling_governor")
    problem = ""
    try:
        file = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(file, governor.encode())
        finally:
            os.close(file)
    except PermissionError:
        problem = _set_by_sudo(path, governor)
    except OSError as error:
        problem = error.strerror or type(error).__name__
    if not problem and _governor(root, policy) != governor:
        problem = "the kernel kept %s" % _governor(root, policy)
    if problem:
        raise wire.Refused("tuning", "cannot set %s to %s: %s" % (path, governor, problem))


def _set_by_sudo(path: str, governor: str) -> str:
    """Write one governor by the one command that the sudoers line allows; what went wrong, or nothing. Never asks for a password."""
    try:
        done = subprocess.run(
            ["sudo", "-n", "/usr/bin/tee", path],
            input=governor.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=SUDO_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "no permission, and sudo: %s" % type(error).__name__
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["refused"]
    return "no permission, and sudo -n /usr/bin/tee: %s" % lines[-1][:200]


def _write_journal(workdir: str, journal: Dict[str, Any]) -> None:
    """All of it on disk under its name, or nothing."""
    path = os.path.join(workdir, JOURNAL)
    temporary = "%s.%d.part" % (path, os.getpid())
    try:
        os.makedirs(workdir, mode=0o700, exist_ok=True)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _refused("nothing was changed, cannot write %s" % temporary, error) from error
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(json.dumps(journal, indent=1, sort_keys=True).encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(workdir)
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise _refused("nothing was changed, cannot write %s" % path, error) from error


def _read_journal(path: str) -> Optional[Dict[str, Any]]:
    """The journal, or ``None`` for one that we did not write: its names become paths and commands, so they are checked."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(file, "rb") as stream:
            content = stream.read(MAX_JOURNAL_BYTES)
    except OSError as error:
        raise _refused("cannot read %s" % path, error) from error
    try:
        journal = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(journal, dict) or not isinstance(journal.get("before"), dict):
        return None
    governors = [journal.get("governor"), *journal["before"].values()]
    if not all(isinstance(text, str) and telemetry.GOVERNOR.fullmatch(text) for text in governors):
        return None
    return journal if all(POLICY.fullmatch(name) for name in journal["before"]) else None


def _forget(path: str, keep: bool = False) -> None:
    """Remove the journal, or set it aside."""
    try:
        if keep:
            os.replace(path, path + ".bad")
        else:
            os.unlink(path)
        _sync_folder(os.path.dirname(path))
    except OSError as error:
        raise _refused("cannot remove %s" % path, error) from error


def _refused(what: str, error: OSError) -> wire.Refused:
    return wire.Refused("tuning", "%s: %s" % (what, error.strerror or type(error).__name__))


def _sync_folder(path: str) -> None:
    """Make a rename or removal in a folder outlast a power cut."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
