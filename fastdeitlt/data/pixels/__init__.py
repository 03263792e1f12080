"""From a request to pixels: read, decode, keep decoded."""
