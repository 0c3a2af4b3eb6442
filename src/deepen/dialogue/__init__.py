"""Talking with a model and its base: in the terminal, and on a page."""
