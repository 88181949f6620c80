"""TAPS: speculative decoding with many specialist drafters. Knows nothing of Ray or HTTP."""

__version__ = "0.1.0"
