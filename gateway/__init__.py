"""The HTTP surface and what every request passes through."""
