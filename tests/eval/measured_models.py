"""Loaders that the measuring tests hand to workers; kept free of anything a worker need not import."""

import os
import time

import torch


def sleeping(argument):
    """Sleeps for argument["ms"] and appends its name to argument["log"] at each call."""
    def generate():
        with open(argument["log"], "a") as log:
            log.write(argument["name"] + "\n")
        print("a model that prints must not disturb the protocol")
        time.sleep(argument["ms"] / 1000)
    generate.weights_bytes = 12_000_000
    return generate


def allocating(megabytes):
    """Fills a tensor of that many MB and drops it."""
    return lambda: torch.ones(int(megabytes * 1e6) // 4).sum()


def failing(when):
    """Fails while loading or generating, or takes the process down."""
    if when == "load":
        raise RuntimeError("the checkpoint is missing")

    def generate():
        os.write(2, b"last words\n")
        os._exit(3)
    return generate
