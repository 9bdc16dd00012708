"""devices/transports."""
