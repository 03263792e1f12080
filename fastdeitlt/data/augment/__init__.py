"""Strong augmentation: drawn ahead on the host, applied to a batch."""
