"""TAPS: speculative decoding with many specialist drafters. Knows nothing of Ray or HTTP."""

import os

# libgomp reads it when torch is loaded, hence here. After a parallel operation its workers spin 300,000
# times by default: 9 ms, on a core that the drafters of this machine need meanwhile. The 0.6 ms left to
# them are far more than they wait between two operations of a pass.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

__version__ = "0.1.0"
