"""The verbs beside training."""
