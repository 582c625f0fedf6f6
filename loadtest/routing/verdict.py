"""Broken promises, counted against what was promised."""

from __future__ import annotations

from routers.promise import binomial_tail

SIGNIFICANCE = 0.01
"""A table has dozens of cells: at 5 % one or two of them would cry wolf."""


def chance_of(broken: int, lives: int, delta: float) -> float:
    """P(X ≥ broken) for X ~ Binomial(lives, δ): small would mean that more than δ are broken."""
    return 1.0 if broken == 0 else 1.0 - binomial_tail(broken - 1, lives, delta)


def is_kept(broken: int, lives: int, delta: float) -> bool:
    """Whether so many broken promises are compatible with "at most δ are" (one-sided, exact)."""
    return chance_of(broken, lives, delta) > SIGNIFICANCE
