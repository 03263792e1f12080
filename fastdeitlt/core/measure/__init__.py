"""Timing: the timer, the ops of a step with inputs of its shapes, and what the first start on a GPU measures."""
