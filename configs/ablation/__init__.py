"""Shipped grids of the ablate command."""
