"""How a cluster is launched, and how a running one is measured."""
