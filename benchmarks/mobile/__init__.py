"""Presets of IRIS on phones' runtimes, measured and reported: ``python -m benchmarks.mobile`` says how."""
