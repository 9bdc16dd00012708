"""Names to specs: where targets, profiles, devices and examples live, and which file wins.

A value with a path separator, or that ends in ``.yaml``, is a path. Any other value is a name, looked up in the project folder
(``./targets``, ``./profiles``), then in the user's config folder, then among the shipped files. A private board needs no fork.
"""

from __future__ import annotations

import importlib.resources
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Literal, TypeVar

from edgeprune.errors import SpecError, UnknownName
from edgeprune.records.base import read_yaml
from edgeprune.records.device import Device, DeviceFile
from edgeprune.records.paths import user_folder
from edgeprune.records.sparsity import PATTERN_FACT
from edgeprune.records.target import Profile, Target

Kind = Literal["targets", "profiles"]
S = TypeVar("S", Target, Profile)

THIS_MACHINE = "this-machine"

_log = logging.getLogger(__name__)


def target(name_or_path: str | Path) -> Target:
    """The target with this name, or in this file.

    Raises:
        UnknownName: no file defines the name, or none defines the profile that the target names.
        SpecError: the file is wrong, or its ``name`` is not its file stem.
    """
    found, path = _load(Target, "targets", name_or_path)
    if found.profile not in profiles():
        raise UnknownName("profile", found.profile, profiles(), where=str(path))
    return found


def profile(name_or_path: str | Path) -> Profile:
    """The profile with this name, or in this file. Raises as :func:`target`."""
    return _load(Profile, "profiles", name_or_path)[0]


def has_kernels_for(found: Profile, pattern: str) -> bool:
    """Whether a profile says that its accelerator has kernels for a pattern of zeros in weights, such as ``2:4``."""
    fact = found.facts.get(PATTERN_FACT)
    return fact is not None and isinstance(fact.value, tuple) and pattern in fact.value


def targets() -> dict[str, Path]:
    """Every target name that can be looked up, and the file that wins."""
    return _files("targets")


def profiles() -> dict[str, Path]:
    """Every profile name that can be looked up, and the file that wins."""
    return _files("profiles")


def devices(path: Path | None = None) -> dict[str, Device]:
    """The devices of this desk, in file order, and always ``this-machine``.

    Args:
        path: the file to read; otherwise ``./devices.yaml``, else the one in the user's config folder, else none.

    Raises:
        SpecError: the file is wrong, or gives ``this-machine`` another transport than ``local``.
    """
    file = path or devices_file()
    found = {} if file is None else dict(read_yaml(DeviceFile, file).devices)
    if THIS_MACHINE not in found:
        found[THIS_MACHINE] = Device(transport="local", targets=tuple(targets()), stand_in=True)
    elif found[THIS_MACHINE].transport != "local":
        raise SpecError(
            f"the device {THIS_MACHINE!r} in {file} must have transport local",
            hint="give the board another name",
        )
    return found


def device(name: str) -> Device:
    """The device with this name.

    Raises:
        UnknownName: no device has it.
        SpecError: as :func:`devices`.
    """
    known = devices()
    if name not in known:
        raise UnknownName("device", name, known)
    return known[name]


def device_for(
    target_name: str, wanted: str | None = None, *, quarantined: Collection[str] = ()
) -> tuple[str, Device]:
    """The device to time a target on, with its name.

    Args:
        target_name: what has to be timed.
        wanted: a device name. Without one: the first board that lists the target, else ``this-machine``. A recording has to be wanted.
        quarantined: names of devices that are not chosen unless they are wanted.

    Raises:
        UnknownName: no device has the wanted name.
        SpecError: the wanted device does not list the target; a local stand-in need not.
    """
    if wanted is not None:
        chosen = device(wanted)
        if not _is_local_stand_in(chosen) and target_name not in chosen.targets:
            raise SpecError(
                f"the device {wanted!r} must list the target {target_name!r} to time it, "
                f"but lists {', '.join(chosen.targets) or 'none'}",
                hint="add it to its targets in devices.yaml, or choose another device",
            )
        return wanted, chosen
    known = devices()
    for name, candidate in known.items():
        is_fit = target_name in candidate.targets and name not in quarantined
        is_asked_for_only = candidate.transport == "replay" or _is_local_stand_in(candidate)
        if is_fit and not is_asked_for_only:
            return name, candidate
    return THIS_MACHINE, known[THIS_MACHINE]


def companions_for(
    target_name: str, chosen_name: str, chosen: Device
) -> tuple[tuple[str, Device], ...]:
    """Devices that may help the chosen one to time a target, by name: the others that list it.

    A stand-in helps no real board, nor the other way round; a recording helps nobody, and this machine not itself under another name.

    Raises:
        SpecError: as :func:`devices`.
    """
    return tuple(
        (name, other)
        for name, other in devices().items()
        if name != chosen_name
        and target_name in other.targets
        and other.stand_in == chosen.stand_in
        and other.transport != "replay"
        and not other.transport == chosen.transport == "local"
    )


def example_dir(name: str) -> Path:
    """The folder of a shipped example, such as ``fashion-mnist``.

    Raises:
        UnknownName: no example has this name.
    """
    root = _shipped("examples")
    folders = sorted(root.iterdir()) if root.is_dir() else []
    known = {
        folder.name.replace("_", "-"): folder
        for folder in folders
        if folder.is_dir() and folder.name[0] not in "._"
    }
    if name not in known:
        raise UnknownName("example", name, known)
    return known[name]


def _load(cls: type[S], kind: Kind, name_or_path: str | Path) -> tuple[S, Path]:
    path = _find(kind, name_or_path)
    found = read_yaml(cls, path)
    if found.name != path.stem:
        raise SpecError(
            f"name in {path} must equal the file's stem {path.stem!r}, but is {found.name!r}",
            hint="rename one of them",
        )
    return found, path


def _find(kind: Kind, name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or _looks_like_path(text):
        return Path(text)
    known = _files(kind)
    if text not in known:
        raise UnknownName(kind.removesuffix("s"), text, known)
    shipped = _shipped(kind) / f"{text}.yaml"
    if shipped.is_file() and not shipped.samefile(known[text]):
        _log.warning("%s shadows the shipped %s %s", known[text], kind.removesuffix("s"), text)
    return known[text]


def _looks_like_path(text: str) -> bool:
    return text.endswith(".yaml") or "/" in text or os.sep in text


def _files(kind: Kind) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in (Path(kind), _config_dir() / kind, _shipped(kind)):
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def devices_file() -> Path | None:
    """``./devices.yaml``, else the one in the user's config folder, else ``None``."""
    for path in (Path("devices.yaml"), _config_dir() / "devices.yaml"):
        if path.is_file():
            return path
    return None


def _config_dir() -> Path:
    """The user's config folder."""
    return user_folder("XDG_CONFIG_HOME", ".config")


def _shipped(kind: str) -> Path:
    """The folder of shipped files: inside the package in a wheel, beside it in a checkout or an editable install."""
    package = Path(str(importlib.resources.files("edgeprune")))
    inside = package / "_data" / kind
    return inside if inside.is_dir() else package.parent / kind


def _is_local_stand_in(candidate: Device) -> bool:
    return candidate.transport == "local" and candidate.stand_in
