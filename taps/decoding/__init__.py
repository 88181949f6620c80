"""Decoding: the loop, its panel of drafters, what it delivers and what it counts."""
