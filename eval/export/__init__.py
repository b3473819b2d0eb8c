"""A pipeline as files for phone runtimes. Importing this package imports neither torch nor a runtime."""
