"""A run while it lasts: its folder, its counters, who may stop it and what goes wrong."""
