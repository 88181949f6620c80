"""The Ray Serve and HTTP edges of the cluster: one file per deployment, thin. No algorithm lives here."""

import taps as taps  # before any module here loads torch: it sets what OpenMP reads then
