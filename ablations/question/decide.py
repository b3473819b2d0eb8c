"""What may stand in a grid's ``decide``; apart from the statistics, which a driver plans without."""

from __future__ import annotations

import math

# Measures of a grid's models beside one another (ablations.session.arm_speed), which a trial by itself does not have.
SPEED = (
    "latency_ms",
    "latency_q1_ms",
    "latency_q3_ms",
    "latency_ratio",
    "latency_ratio_low",
    "latency_ratio_high",
    "peak_memory_mb",
    "weights_mb",
    "activations_mb",
    "import_mb",
)
SKILLS = ("accuracy_", "heldout_accuracy_")  # how the measures of skills begin
# What else a trial is measured by.
MEASURES = (
    "fid",
    "fid_infinity",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "clip_score",
    "validation_loss",
    "latent_psnr",
    "train_seconds",
    "params_m",
    "gflops",
    "nfe",
    *SPEED,
)
EXPECTATIONS = ("better", "worse", "equivalent", "not better", "not worse")


def fraction(value: float | str) -> float:
    """0.05 from 0.05 or "5%". Raises ValueError for anything else, and for a negative fraction."""
    try:
        number = float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < 1:
        raise ValueError(
            f"decide.practical must be a fraction below 1 or a percentage below 100%, such as 5%, got {value!r}"
        )
    return number
