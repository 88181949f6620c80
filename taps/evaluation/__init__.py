"""Measuring drafters: what each strategy and tree size buys, from recorded runs of the target."""
