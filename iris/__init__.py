"""IRIS: Iterative Recurrent Image Synthesis."""
