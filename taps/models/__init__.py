"""Tensors: the KV cache, tree attention, the draft head and checkpoints."""
