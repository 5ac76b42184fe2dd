"""A module for each thing that reads: `check(data, folder)` and `seeds()`."""
