"""Which images: splits, labels, counts, class names."""
