"""One invocation of a grid: which jobs, what they do, what a person sees meanwhile."""
