"""``python -m eval``: a model's path in, numbers with their uncertainty and their making out."""
