"""The configuration of ``python -m eval``; Hydra finds it as a module."""
