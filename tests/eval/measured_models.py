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


def computing(seconds):
    """Computes until it has used that much processor time."""

    def generate():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return generate


def failing(when):
    """Fails while loading or generating, or takes the process down."""
    if when == "load":
        raise RuntimeError("the checkpoint is missing")

    def generate():
        os.write(2, b"last words\n")
        os._exit(3)

    return generate


def parted(argument):
    """A model of two parts: "fill" writes a tensor of argument["mb"] MB a batch and says so, "rest" a tenth of it."""
    batch, alone = argument.get("batch", 1), argument.get("part")

    def part(name, megabytes, count):
        def run():
            return torch.ones(int(batch * megabytes * 1e6) // 4).add_(1).sum()

        run.count, run.weights_bytes = count, 1_000_000
        run.activations_bytes = int(batch * megabytes * 1e6)
        return run

    parts = {"fill": part("fill", argument["mb"], 2), "rest": part("rest", argument["mb"] / 10, 1)}
    parts["half"] = part("half", argument["mb"] / 2, 4)
    parts["half"].within = "fill"
    if alone is not None:
        return parts[alone]

    def generate():
        for run in (parts["fill"], parts["fill"], parts["rest"]):
            run()

    generate.weights_bytes, generate.parts = 2_000_000, parts
    return generate


def growing(argument):
    """Parts that take time in proportion to tokens^argument["power"]: a loop, so that processor time follows."""

    def on(tokens):
        turns = int(argument["turns"] * tokens ** argument["power"])

        def run():
            total = 0
            for i in range(turns):
                total += i
            return torch.ones(tokens)

        return run

    def generate():
        return None

    generate.parts = {str(tokens): on(tokens) for tokens in argument["tokens"]}
    return generate


def importing(argument):
    """A loader whose ``imports`` takes argument MB, which then count as the runtime's."""
    return lambda: len(importing.kept)


def _imports(argument):
    importing.kept = b"x" * int(argument * 1e6)


importing.imports = _imports
