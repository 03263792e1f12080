"""Grids of settings and seeds, and their table."""
