"""The `adaptive` strategy: whom to ask, for how much, what a node is worth; learned from every answer."""

ADAPTIVE = "adaptive"
