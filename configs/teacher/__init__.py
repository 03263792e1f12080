"""Shipped recipes of teachers."""
