"""The transport seam: one module a transport, found by its file name. See :class:`~edgeprune.devices.link.pipe.Transport`."""

from __future__ import annotations

import importlib
import pkgutil

from edgeprune.devices.link.pipe import Transport
from edgeprune.errors import UnknownName
from edgeprune.records.device import Device


def names() -> list[str]:
    """Names of the transports that have a module here."""
    import edgeprune.devices.link.transports as package

    return sorted(
        m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")
    )


def open_transport(device: Device) -> Transport:
    """A connection to the device, by the module that its ``transport`` names.

    Raises:
        UnknownName: no such transport.
        DeviceError: the device cannot be reached, is not the pinned one, or refuses the login.
    """
    if device.transport not in names():
        raise UnknownName("transport", device.transport, names())
    module = importlib.import_module(f"edgeprune.devices.link.transports.{device.transport}")
    opened: Transport = module.open_transport(device)
    return opened


__all__ = ["names", "open_transport"]
