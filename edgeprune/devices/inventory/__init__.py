"""The entries of ``devices.yaml``, and which of its boards are not trusted at present."""
