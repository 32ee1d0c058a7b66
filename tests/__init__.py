"""A package, so that `tests.guards` is found before any stray top-level `tests` in site-packages."""
