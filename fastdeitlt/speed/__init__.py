"""Images a second: `bench`, `profile`, `tune`."""
