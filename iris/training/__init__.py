"""Training: one loop, and the tasks it runs."""
