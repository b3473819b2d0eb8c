"""The configuration of ``python -m iris.training``; Hydra finds it as a module."""
