"""One script per method, each ending in a saved picture."""
