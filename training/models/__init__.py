"""Architectures that ``model.factory`` can name; each file reads from top to bottom."""
