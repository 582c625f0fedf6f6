"""Replay of recorded traffic, the demo, and load scenarios."""
