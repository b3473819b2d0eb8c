"""Depth as a choice: how the core is looped, what enters each pass, and how a loop of any length is trained."""

from __future__ import annotations

from dataclasses import dataclass

from iris.errors import SettingError
from iris.settings import check, setting


@dataclass(frozen=True)
class Depth:
    """Settings depth.*.

    Attributes:
        share: one core for all passes, or ``core * iterations`` layers of their own (the unrolled opponent).
        injection: how the prelude's output e enters each pass: ``concat`` (linear on [state, e], Huginn's adapter,
            arXiv 2502.05171), ``add`` (their mean; a sum would grow with every pass), ``none``.
        initial: the state before the first pass: ``input`` (e itself), ``noise`` (normal, deviation sqrt(2/5) as in
            Huginn), ``zero``.
        norm: ``pre`` (each part reads a normalised state) or ``sandwich`` (the sum is normalised again, which bounds the
            state by itself).
        conditioning: ``layer`` (adaLN-Zero in each layer, which also sees the pass), ``single`` (one such projection for
            all layers plus a learned table in each, PixArt's adaLN-single, arXiv 2310.00426), ``time`` (adaLN-Zero in
            each layer that does not see the pass).
        training: passes of a training step: ``fixed`` (model.iterations), ``drawn`` (log-normal Poisson around it,
            Huginn), ``exits`` (model.iterations with a random early exit trained beside it, ELT, arXiv 2604.09168).
        backprop: gradient flows through the last so many passes (None: all).
        carry: the state of one sampling step starts the next (RIN's latent self-conditioning, arXiv 2212.11972).

    Raises:
        SettingError: an unknown word, or a combination that would lose the input or its gradient.
    """

    share: bool = setting(True, "one core for all passes; false: core * iterations layers of their own")
    injection: str = setting("concat", "what enters each pass beside the state", choices=("concat", "add", "none"))
    initial: str = setting("input", "the state before the first pass", choices=("input", "noise", "zero"))
    norm: str = setting("pre", "sandwich: the sum is normalised again", choices=("pre", "sandwich"))
    conditioning: str = setting("layer", "adaLN-Zero; time: does not see the pass", choices=("layer", "single", "time"))
    training: str = setting("fixed", "passes of a training step", choices=("fixed", "drawn", "exits"))
    backprop: int | None = setting(None, "gradient through the last so many passes; null: all", low=1)
    carry: bool = setting(False, "the state of one sampling step starts the next")

    def __post_init__(self) -> None:
        check(self, "depth")
        if self.injection == "none" and self.initial != "input":
            raise SettingError(
                f"depth.injection=none loses the input with depth.initial={self.initial}; use depth.initial=input"
            )
        if self.injection == "none" and self.backprop is not None:
            raise SettingError(
                "depth.backprop needs an injection: with depth.injection=none the prelude would get no gradient"
            )
        if self.backprop is not None and self.training == "exits":
            raise SettingError(
                f"depth.backprop={self.backprop} must be null with depth.training=exits: an exit before the "
                "last passes would get no gradient"
            )
        if self.backprop is not None and not self.share:
            raise SettingError(
                f"depth.backprop={self.backprop} must be null with depth.share=false: layers of the passes "
                "before would get no gradient"
            )
        if not self.share and self.training != "fixed":
            raise SettingError(f"depth.training={self.training} needs depth.share=true: unshared layers run once each")
