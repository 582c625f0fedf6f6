"""Signals to confidence to decision: pure functions and estimators, no I/O."""
