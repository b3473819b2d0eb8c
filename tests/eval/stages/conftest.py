from private_cache import private_cache  # noqa: F401 (a fixture of every test here)
