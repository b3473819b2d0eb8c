"""Pictures a second that the drawn worlds make on one core: ``python benchmarks/shapes_throughput.py``."""

from __future__ import annotations

import statistics
import time

from iris.data import WORLDS

PICTURES, ROUNDS = 8192, 5


def main() -> None:
    """Print the median and range of a few rounds for each world; drawing uses numpy on one thread."""
    for world in WORLDS.values():
        world.draw("train", 64, 0)  # builds the table of tuples
        rates = []
        for seed in range(ROUNDS):
            started = time.perf_counter()
            world.draw("train", PICTURES, seed)
            rates.append(PICTURES / (time.perf_counter() - started))
        print(
            f"{world.name}: {statistics.median(rates):,.0f} pictures/s at {world.size}x{world.size} "
            f"({min(rates):,.0f} to {max(rates):,.0f}), pixels and captions"
        )


if __name__ == "__main__":
    main()
