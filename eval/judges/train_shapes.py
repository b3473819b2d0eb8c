"""Make judge ``shapes``: ``python -m eval.judges.train_shapes``.

Trains the two towers on freshly drawn pictures of both worlds with the symmetric contrastive loss of CLIP (Radford et
al. 2021, arXiv:2103.00020) plus cross-entropy on every attribute. Pictures come in groups of four whose attribute
tuples differ in one attribute, so that each batch holds hard negatives (as NegCLIP, Yuksekgonul et al. 2023,
arXiv:2210.01936). Half of the pictures are blurred, noised and tinted, so that the judge also reads a generator's
imperfect pictures.

All colour-shape pairs are allowed here, the held-out ones too: this is the measuring device, not a model under test,
and it must read what a model composes. The pictures it is measured on come from seeds that training never uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.judges.images import resized
from eval.judges.shapes import WEIGHTS, ShapesJudge, TwoTowers, WordTokenizer
from iris.data import WORLDS
from iris.data.raster import key_of, random_bits, unit
from iris.data.world import Pictures, World

STEPS, BATCH, GROUP, RATE, WARM_UP, WEIGHT_DECAY = 1100, 256, 4, 3e-3, 100, 0.02
CONTEXT, WIDTH = 18, 64
MEASURED_SEED = 1_000_003  # of the pictures that the record is measured on
RETRIEVED, MEASURED = 256, 2048  # pictures a retrieval round, pictures an attribute accuracy
ROUNDS = 4


def vocabulary() -> list[str]:
    """All words of both worlds' captions, sorted."""
    words: set[str] = set()
    for world in WORLDS.values():
        rows = world.tuples["all"]
        for phrasing in range(world.phrasings):
            for text in world.caption(world.columns(rows[::7]), phrasing):
                words.update(text.replace(",", " ").split())
    return sorted(words)


def architecture(vocabulary_size: int) -> dict[str, Any]:
    """open_clip's model config of the two towers."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 32},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": vocabulary_size, "width": WIDTH, "heads": 4, "layers": 2},
    }


def neighbours(world: World, groups: int, bits: np.ndarray) -> np.ndarray:
    """Attribute tuples int64 [groups * GROUP, A]: each group a random tuple and GROUP - 1 that differ in one attribute.

    ``bits``: random uint64 [groups * GROUP, 3]. A change that leads out of the world is dropped.
    """
    table = world.tuples["all"]
    sizes = np.asarray([len(values) for values in world.attributes.values()])
    base = table[(bits[::GROUP, 0] % np.uint64(len(table))).astype(np.int64)].repeat(GROUP, axis=0)
    changed = base.copy()
    lines = np.arange(len(base))
    column = (bits[:, 1] % np.uint64(len(sizes))).astype(np.int64)
    shift = 1 + (bits[:, 2] % (sizes[column] - 1).astype(np.uint64)).astype(np.int64)
    changed[lines, column] = (changed[lines, column] + shift) % sizes[column]
    keep = (lines % GROUP == 0) | ~world.allowed(world.columns(changed))
    return np.where(keep[:, None], base, changed)


def draw_batch(world: World, count: int, seed: int, step: int) -> tuple[Tensor, list[str], np.ndarray]:
    """Training pictures uint8 [count, 3, H, W], captions and attribute tuples [count, A] of one step."""
    bits = random_bits(key_of("judge", world.name, seed, step), np.arange(count), 4 + world.jitters)
    rows = neighbours(world, count // GROUP, bits[:, :3])
    columns = world.columns(rows)
    size = 32 if step % 2 else world.size  # shapes2 may also be generated at 32
    images = world.render(columns, unit(bits[:, 4:]), size)
    captions = world.caption(columns, (bits[:, 3] % np.uint64(world.phrasings)).astype(np.int64))
    return torch.from_numpy(images).permute(0, 3, 1, 2), captions, rows


def spoil(images: Tensor, draw: torch.Generator) -> Tensor:
    """Blur, noise and tint float images [B, 3, H, W] in [-1, 1]; one width of blur for all of them."""
    sigma = 0.2 + 0.8 * float(torch.rand((), generator=draw)) * images.shape[-1] / 32
    tap = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * sigma**2))
    kernel = (tap / tap.sum()).expand(3, 1, 1, 7)
    spoiled = F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)
    spoiled = F.conv2d(spoiled, kernel.transpose(2, 3), groups=3)
    gain = 1.0 + 0.1 * (2 * torch.rand(len(images), 1, 1, 1, generator=draw) - 1)
    tint = 0.08 * (2 * torch.rand(len(images), 3, 1, 1, generator=draw) - 1)
    noise = 0.12 * torch.rand(len(images), 1, 1, 1, generator=draw) * torch.randn(images.shape, generator=draw)
    return (spoiled * gain + tint + noise).clamp(-1.0, 1.0)


def training_images(pictures: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """uint8 [B, 3, H, W] -> the image tower's input, every second picture spoiled at its own resolution."""
    images = pictures.float() / 127.5 - 1.0
    images[::2] = spoil(images[::2], draw)
    return resized(images, size)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric loss of unit embeddings [B, D]; every caption of a picture's tuple is right: ``same`` [B, B]."""
    logits = scale * image @ text.T
    target = same / same.sum(dim=1, keepdim=True)  # symmetric, so that it serves both directions
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_step(towers: TwoTowers, tokenizer: WordTokenizer, seed: int, step: int) -> tuple[Tensor, dict[str, float]]:
    """Loss of one step on half a batch of each world, and its parts as numbers."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    drawn = {name: draw_batch(world, BATCH // 2, seed, step) for name, world in WORLDS.items()}
    size = towers.clip.visual.image_size
    images = torch.cat([training_images(part[0], size, draw) for part in drawn.values()])
    tokens = tokenizer([text for part in drawn.values() for text in part[1]])
    identity = [(i, *row) for i, part in enumerate(drawn.values()) for row in part[2].tolist()]
    number = {key: i for i, key in enumerate(dict.fromkeys(identity))}
    label = torch.tensor([number[key] for key in identity])

    embedding = towers.clip.encode_image(images)
    text = towers.clip.encode_text(tokens, normalize=True)
    scale = towers.clip.logit_scale.clamp(max=math.log(100)).exp()
    contrast = contrastive_loss(F.normalize(embedding, dim=-1), text, scale, (label[:, None] == label).float())
    read = torch.zeros(())
    for (world, part), mine in zip(drawn.items(), embedding.chunk(len(drawn)), strict=True):
        for i, logits in enumerate(towers.attribute_logits(world, mine).values()):
            read = read + F.cross_entropy(logits, torch.from_numpy(part[2][:, i]))
    return contrast + 0.5 * read, {"contrast": contrast.item(), "attributes": read.item()}


def train(towers: TwoTowers, tokenizer: WordTokenizer, steps: int, seed: int) -> None:
    """Train in place with AdamW, warm-up and cosine decay."""
    decayed = [p for p in towers.parameters() if p.ndim > 1]
    plain = [p for p in towers.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARM_UP, 1.0) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    started = time.monotonic()
    towers.train().to(memory_format=torch.channels_last)  # the image tower is 1.5 times as fast on CPU
    for step in range(steps):
        loss, parts = train_step(towers, tokenizer, seed, step)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(
                f"step {step:5d}/{steps}  contrast {parts['contrast']:.3f}  attributes {parts['attributes']:.3f}  "
                f"{(step + 1) * BATCH / seconds:.0f} pictures/s  {seconds:.0f} s",
                flush=True,
            )


def as_tensor(pictures: Pictures) -> Tensor:
    """Images uint8 [n, H, W, 3] -> float [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures.images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def attribute_accuracy(
    judge: ShapesJudge, world: World, split: str, count: int, seed: int, spoiled: bool = False
) -> dict[str, float]:
    """Share of pictures whose attribute is read rightly, for each attribute, and "caption" for all of them at once.

    With ``spoiled``, of blurred, noised and tinted pictures, in portions of 128 that each have their own blur.
    """
    pictures = world.draw(split, count, seed)
    images = as_tensor(pictures)
    if spoiled:
        draw = torch.Generator().manual_seed(seed)
        images = torch.cat([spoil(part, draw) for part in images.split(128)])
    read = judge.attributes(world.name, images)
    right = {name: read[name].cpu().numpy() == pictures.attributes[name] for name in world.attributes}
    right["caption"] = np.logical_and.reduce(list(right.values()))
    return {name: round(float(hits.mean()), 5) for name, hits in right.items()}


def retrieval(judge: ShapesJudge, world: World, split: str, seed: int) -> float:
    """Share of 256 pictures whose nearest caption of the 256 has their attribute tuple (image -> text, top 1)."""
    pictures = world.draw(split, RETRIEVED, seed)
    image = F.normalize(judge.image_features(as_tensor(pictures)), dim=-1)
    nearest = (image @ F.normalize(judge.text_features(pictures.captions), dim=-1).T).argmax(dim=-1).cpu().numpy()
    rows = np.stack(list(pictures.attributes.values()), axis=1)
    return float((rows == rows[nearest]).all(axis=1).mean())


def measure(judge: ShapesJudge) -> dict[str, Any]:
    """The record's figures: retrieval@1 and attribute accuracies of each world on the splits no model trains on."""
    figures: dict[str, Any] = {"retrieval_at_1": {}, "attribute_accuracy": {}, "attribute_accuracy_spoiled": {}}
    for name, world in WORLDS.items():
        for split in ("validation", "heldout"):
            rounds = [retrieval(judge, world, split, MEASURED_SEED + i) for i in range(ROUNDS)]
            figures["retrieval_at_1"][f"{name}/{split}"] = round(sum(rounds) / ROUNDS, 5)
            figures["attribute_accuracy"][f"{name}/{split}"] = attribute_accuracy(
                judge, world, split, MEASURED, MEASURED_SEED
            )
            figures["attribute_accuracy_spoiled"][f"{name}/{split}"] = attribute_accuracy(
                judge, world, split, MEASURED, MEASURED_SEED, spoiled=True
            )
    figures["measured_on"] = (
        f"{MEASURED} pictures a split for accuracies, {ROUNDS} x {RETRIEVED} for retrieval, seed {MEASURED_SEED}: "
        "pictures that training never drew, of attribute tuples that it did (a judge must know them all)"
    )
    return figures


def save(towers: TwoTowers, words: list[str], weights: Path, record: dict[str, Any]) -> ShapesJudge:
    """Write weights (half precision) and record, then measure what was stored."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in towers.state_dict().items()}
    data = safetensors.torch.save({name: value.contiguous() for name, value in state.items()})
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(data)
    attributes = {
        name: {key: list(values) for key, values in world.attributes.items()} for name, world in WORLDS.items()
    }
    content = {
        "architecture": architecture(len(words) + 3),
        "attributes": attributes,
        "vocabulary": words,
        "record": {**record, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
    }
    file = weights.with_suffix(".json")
    file.write_text(json.dumps(content, indent=1) + "\n")
    return measure_again(weights)


def measure_again(weights: Path) -> ShapesJudge:
    """Measure the stored judge and write the figures into its record."""
    file = weights.with_suffix(".json")
    content = json.loads(file.read_text())
    content["record"].pop("feature_rms", None)
    file.write_text(json.dumps(content, indent=1) + "\n")
    judge = ShapesJudge(weights=weights, record=file)
    real = as_tensor(WORLDS["shapes"].draw("validation", MEASURED, MEASURED_SEED))
    content["record"]["feature_rms"] = judge.image_features(real).square().mean().sqrt().item()
    content["record"].update(measure(judge))
    file.write_text(json.dumps(content, indent=1) + "\n")
    return ShapesJudge(weights=weights, record=file)


def main() -> None:
    """Parse the command line, train, save, print the record."""
    parser = argparse.ArgumentParser(description="Train judge shapes and write its weights and record.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} pictures each (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="weights; the record goes beside them as .json")
    parser.add_argument("--measure", action="store_true", help="only measure the weights at --out again")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be >= 1, not {options.steps}")
    torch.set_num_threads(options.threads)
    judge = measure_again(options.out) if options.measure else make(options.steps, options.seed, options.out)
    print(json.dumps(judge.record, indent=1))


def make(steps: int, seed: int, out: Path) -> ShapesJudge:
    """Train from scratch on this process's threads and write weights and record."""
    torch.manual_seed(seed)
    words = vocabulary()
    towers = TwoTowers(
        architecture(len(words) + 3),
        {name: {key: len(values) for key, values in world.attributes.items()} for name, world in WORLDS.items()},
    )
    started = time.monotonic()
    train(towers, WordTokenizer(words, CONTEXT), steps, seed)
    threads = torch.get_num_threads()
    return save(
        towers,
        words,
        out,
        {
            "name": "shapes",
            "command": f"python -m eval.judges.train_shapes --steps {steps} --seed {seed} --threads {threads}",
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - started),
            "steps": steps,
            "batch": BATCH,
            "seed": seed,
            "threads": threads,
            "parameters": sum(p.numel() for p in towers.parameters()),
            "worlds": {name: world.version for name, world in WORLDS.items()},
        },
    )


if __name__ == "__main__":
    main()
