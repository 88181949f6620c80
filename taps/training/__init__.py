"""Training a specialist: the target's own answers and features in, a draft head out."""
