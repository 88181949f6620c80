"""Drafters: what a session's decided tokens and features are turned into proposal trees by."""
