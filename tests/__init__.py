"""Tests: one file per concept, named for invariants. `tests/fakes.py` holds what they share."""
