"""The engine: what a replica that runs the target does, for many sessions at once."""
