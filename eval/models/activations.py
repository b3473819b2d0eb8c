"""How many bytes of tensors are alive at the peak of a generator's and of a decoder's run, from the architecture alone.

Eager PyTorch without gradients keeps a tensor for as long as a name or a caller's argument holds it. What is counted
here is what the code of ``iris.nn.generator``, ``iris.nn.blocks`` and ``iris.latents`` holds at its fullest moment; what
``eval.speed.probes.ActivationTracker`` counts on a run is the check. Vectors of one image (times, modulations) are left out,
as is the scratch memory of kernels.
"""

from __future__ import annotations

from torch import nn

from iris.latents.base import Latent
from iris.latents.phone import Bound, SeparableBlock
from iris.latents.vae import VAE, ResidualBlock
from iris.nn.generator import GeneratorConfig
from iris.nn.layers import LocalAttention

# Tensors [N, width] of the weights' precision that a mixer has made and holds at its fullest, on 1,024 tokens: in
# float32, and in half precision, where recurrence and transform compute in float32. Attention: queries, keys and values
# (3), both normalised (2), both turned (2), one half being turned (1). In a GRFM a pathway's result waits for the next.
MIXER_TENSORS = {
    "grfm": (9.0, 16.0),
    "attention": (8.0, 8.0),
    "linear_attention": (8.0, 11.5),
    "conv3": (3.0, 3.0),
    "conv7": (3.0, 3.0),
    "identity": (0.0, 0.0),
    "fourier": (7.0, 15.0),
    "recurrence": (8.0, 15.0),
    "spatial": (3.0, 3.0),
}


def mixer_peak(mixer: str, tokens: int, width: int, batch: int = 1, itemsize: int = 4) -> int | None:
    """Bytes alive at the peak of one mixer of ``width`` on [batch, tokens, width]; None for one without an entry."""
    if mixer not in MIXER_TENSORS:
        return None
    return round(MIXER_TENSORS[mixer][itemsize < 4] * batch * tokens * width * itemsize)


def generator_peak(
    config: GeneratorConfig,
    h: int,
    w: int,
    text_length: int,
    batch: int = 1,
    iterations: int | None = None,
    itemsize: int = 4,
) -> int | None:
    """Bytes alive at the peak of one generator evaluation; None for a mixer without an entry above.

    The larger of two, for s bytes a number, B images, N = h w tokens, L text tokens of width T, and of the generator D,
    E (the mixer's width), rho, K core layers:

    - Core: s B [N (D (3 + p) + max(m E, (1 + 2 rho) D)) + 3 K L D + L T]. Alive are the prelude's output, the layer's
      input and its modulated copy (3), the pass before from the second on (p = 1), then either the mixer's m tensors, or
      the sum behind it and the feed-forward's hidden layer before and after its GELU; for all passes the text's
      normalised tokens, keys (twice, as made and normalised) and values.
    - Coda: s B D [N (3 + q) + a]. Alive are the prelude's output, the core's state, the modulated copy (3), the block
      before from the second on (q = 1), and what local attention holds: a = 8 N in its dense form, and in blocks
      4 N + 9 h' w' + (h' + 4) (w' + 4) with h', w' rounded up to whole blocks: queries once, keys and values four times,
      as blocks with a halo hold each token four times.

    Args:
        text_length: L.
        iterations: passes through the core (None: as configured).
        itemsize: s.
    """
    tokens = h * w
    mixer = mixer_peak(config.mixer, tokens, config.mixer_width or config.dim, batch, itemsize)
    if mixer is None:
        return None
    passes = config.iterations if iterations is None else iterations
    dim, layers = config.dim, config.core * (1 if config.depth.share else config.iterations)
    feed_forward = itemsize * batch * tokens * (dim + 2 * int(config.ffn_ratio * dim))
    held = tokens * dim * (3 + (passes > 1)) + text_length * (3 * layers * dim + config.text_width)
    core = itemsize * batch * held + max(mixer, feed_forward)
    coda = itemsize * batch * dim * (tokens * (3 + (config.coda > 1)) + _local_attention(h, w))
    return max(core, coda)


def _local_attention(h: int, w: int) -> int:
    """Tokens' worth of tensors alive in ``iris.nn.layers.LocalAttention`` with blocks of 4 and a halo of 2."""
    if h * w <= LocalAttention.DENSE:
        return 8 * h * w
    rows, columns = (4 * -(-side // 4) for side in (h, w))
    return 4 * h * w + 9 * rows * columns + (rows + 4) * (columns + 4)


def decoder_peak(latent: Latent, h: int, w: int, batch: int = 1, itemsize: int = 4) -> int | None:
    """Bytes alive at the peak of decoding latents [batch, C, h, w]; None for a latent that is not a ``VAE``.

    s B max over the decoder's layers of n times channels: 5 c in a separable block (skip, expanded before and after
    its ReLU), 4 c in a residual block, in + out of a convolution, c / 4 + c of an upsampling to n positions; and 4
    times the bands in the inverse wavelet (5 with several levels). n is the layer's number of output positions.
    """
    if not isinstance(latent, VAE):
        return None
    positions, channels, peak = h * w, latent.channels, 0.0
    for layer in latent.decoder:
        alive, channels, positions = _layer(layer, channels, positions)
        peak = max(peak, alive)
    peak = max(peak, (4 + (latent.levels > 1)) * channels * positions)
    return round(itemsize * batch * peak)


def _layer(layer: nn.Module, channels: int, positions: int) -> tuple[float, int, int]:
    """Numbers alive in a decoder's layer, its output's channels and positions."""
    if isinstance(layer, SeparableBlock):
        return 5 * channels * positions, channels, positions
    if isinstance(layer, ResidualBlock):
        return 4 * channels * positions, channels, positions
    if isinstance(layer, nn.Conv2d):
        return (channels + layer.out_channels) * positions, layer.out_channels, positions
    if isinstance(layer, nn.Upsample):
        return 5 * channels * positions, channels, 4 * positions
    if isinstance(layer, nn.PixelShuffle):
        return 2 * channels * positions, channels // 4, 4 * positions
    if isinstance(layer, Bound):
        return 4 * channels * positions, channels, positions
    raise TypeError(f"no formula for the memory of a {type(layer).__name__} in a decoder")
