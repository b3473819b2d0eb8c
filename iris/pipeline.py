"""Text in, images out: text encoder, generator and latent, called, saved and loaded as diffusers' pipelines are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from huggingface_hub.repocard import ModelCard
from PIL import Image
from torch import Tensor

from iris.diffusion.editing import Picture, invert, read_images, read_mask
from iris.diffusion.flow import integrate, time_grid
from iris.diffusion.sampling import GuidedVelocity, Noise, SamplingSettings, addressed_noise, drawn_noise, working_dtype
from iris.errors import SettingError, require_choice
from iris.io.hub import fetch_pipeline, is_hub_name
from iris.io.pixels import to_pixels
from iris.latents import Latent
from iris.model import CARD, Parts, TextToLatent, read_folder, write_folder
from iris.nn.condition import TextCondition

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STRENGTH = 0.6  # of image-to-image, as in diffusers' pipeline of SD3

# Called with the pipeline, the step, its time and {"latents": …}; may return the latents to go on with in such a dict.
StepCallback = Callable[["IrisPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class IrisOutput(NamedTuple):
    """What a pipeline returns: PIL images [N], an array [N, H, W, 3] or tensor [N, 3, H, W] in [0, 1], or latents."""

    images: list[Image.Image] | np.ndarray | Tensor


class IrisPipeline(
    ModelHubMixin,
    library_name="iris",
    license="apache-2.0",
    pipeline_tag="text-to-image",
    tags=["iris"],
    model_card_template=CARD,
):
    """A trained model ready to make images.

    Args:
        model: text encoder and generator.
        latent: decodes what the generator makes.
        latent_name, latent_options: what ``build_latent`` made it with.
        size: side in pixels of the images it was trained on, the default of ``height`` and ``width``.
    """

    def __init__(
        self, model: TextToLatent, latent: Latent, latent_name: str, latent_options: dict[str, Any], size: int
    ) -> None:
        self.model, self.latent, self.size = model.eval(), latent.eval(), size
        self.latent_name, self.latent_options = latent_name, latent_options
        self._copies_text = False

    @property
    def parts(self) -> Parts:
        """What it is made of."""
        return Parts(self.model, self.latent, self.latent_name, self.latent_options, self.size)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.generator.input.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The generator's precision."""
        return self.model.generator.input.weight.dtype

    def to(self, *args: Any, **kwargs: Any) -> IrisPipeline:
        """Move to a device or dtype in place, as ``torch.nn.Module.to``. Latents stay in float32 at least."""
        self.model.to(*args, **kwargs)
        self.latent.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 4,
        num_iterations: int | None = None,
        guidance_scale: float = 3.0,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        sampler: str = "euler",
        shift: float = 1.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        guidance_rescale: float = 0.0,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> IrisOutput:
        """Images of ``prompt``; or ``image`` changed towards it, if one is given.

        Args:
            prompt: one caption or several.
            num_inference_steps, sampler, shift: of ``iris.diffusion.flow``. All steps are taken, whatever the strength.
            num_iterations: passes through the core (None: as trained).
            guidance_scale, guidance_start, guidance_end, guidance_rescale: of ``iris.diffusion.guidance.Guidance``.
            negative_prompt: what guidance leads away from instead of the empty caption.
            num_images_per_prompt: images of each prompt, one after another.
            image: picture to start from (``iris.diffusion.editing.read_images`` says in which forms): image-to-image.
            mask_image: with ``image``, white where to repaint: inpainting.
            strength: how far ``image`` is noised: 0 returns it as the latent reconstructs it, 1 ignores what is
                repainted. None: 0.6, and 1 with a mask.
            height, width: in pixels, multiples of the latent's factor (None: as trained).
            latents: unit noise [N, C, height / factor, width / factor] to start from.
            generator: draws the noise. None: image i starts from noise addressed by (``seed``, i), so that the same
                call gives the same images.
            output_type: pil, np or pt (in [0, 1]), or latent (standardised).
            callback_on_step_end: called after each step, see ``StepCallback``.

        Raises:
            SettingError: an argument that cannot be used, named.
        """
        require_choice("output_type", output_type, OUTPUT_TYPES)
        settings = SamplingSettings(
            num_inference_steps,
            sampler,
            guidance_scale,
            shift,
            num_iterations,
            guidance_start,
            guidance_end,
            guidance_rescale,
        )
        prompts = _texts("prompt", prompt, None, num_images_per_prompt)
        against = _texts(
            "negative_prompt", negative_prompt or "", len(prompts) // num_images_per_prompt, num_images_per_prompt
        )
        height, width = self._sides(height, width)
        picture = self._picture(image, mask_image, strength, len(prompts), num_images_per_prompt, height, width)
        source = addressed_noise(seed) if generator is None else drawn_noise(generator)
        noise = self._start(len(prompts), height, width, source, latents)
        z = self._sample(prompts, against, noise, settings, source, picture, callback_on_step_end)
        return IrisOutput(self._output(z, output_type, picture))

    @torch.no_grad()
    def edit(
        self,
        image: Any,
        source_prompt: str,
        target_prompt: str,
        num_inference_steps: int = 8,
        num_iterations: int | None = None,
        guidance_scale: float = 3.0,
        *,
        sampler: str = "midpoint",
        shift: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> IrisOutput:
        """``image`` as ``target_prompt`` would have had it, from the noise that ``source_prompt`` makes it of.

        The flow is followed backwards under ``source_prompt`` without guidance, and forwards again under
        ``target_prompt``. With one and the same prompt and guidance_scale=1 it gives the image back, up to the
        sampler's error and the latent's. ``options``: others of ``__call__``.

        Raises:
            SettingError: as ``__call__``; a sampler that draws noise.
        """
        height, width = self._sides(height, width)
        settings = SamplingSettings(num_inference_steps, sampler, shift=shift, iterations=num_iterations)
        clean = self._encode(read_images(image, height, width))
        text, _ = self._condition([source_prompt] * len(clean), [], settings)
        latents = invert(GuidedVelocity(self.model.generator, text, iterations=num_iterations), clean, settings)
        return self(
            [target_prompt] * len(latents),
            num_inference_steps,
            num_iterations,
            guidance_scale,
            sampler=sampler,
            shift=shift,
            height=height,
            width=width,
            latents=latents,
            **options,
        )

    @torch.inference_mode()
    def generate(
        self, captions: Sequence[str], settings: SamplingSettings, seed: int = 0, first: int = 0, batch: int = 256
    ) -> Tensor:
        """Images uint8 [len(captions), size, size, 3] of ``captions``.

        Image i starts from noise addressed by (seed, first + i), whatever the batch size.
        """
        parts = []
        for start in range(0, len(captions), batch):
            chosen = captions[start : start + batch]
            source = addressed_noise(seed, first + start)
            noise = self._start(len(chosen), self.size, self.size, source)
            z = self._sample(chosen, [""] * len(chosen), noise, settings, source)
            parts.append(to_pixels(self._decode(z)))
        return torch.cat(parts)

    def _sample(
        self,
        prompts: Sequence[str],
        against: Sequence[str],
        noise: Tensor,
        settings: SamplingSettings,
        source: Noise,
        picture: Picture | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Standardised latents [N, C, h, w] of ``prompts`` from unit ``noise``."""
        strength = 1.0 if picture is None else picture.strength
        z = noise if picture is None else picture.start(noise)
        if strength == 0:
            return z
        times = time_grid(settings.steps, settings.shift, strength)
        text, null = self._condition(prompts, against, settings)
        velocity = GuidedVelocity(self.model.generator, text, null, settings.guide, settings.iterations)
        keep = None if picture is None else picture.keep(noise)

        def after(step: int, t: Tensor, z: Tensor) -> Tensor:
            z = z if keep is None else keep(step, t, z)
            answer = callback(self, step, times[step], {"latents": z}) if callback is not None else None
            return (answer or {}).get("latents", z)

        return integrate(velocity, z, times, settings.sampler, lambda step: source(tuple(z.shape), step).to(z), after)

    def _condition(
        self, prompts: Sequence[str], against: Sequence[str], settings: SamplingSettings
    ) -> tuple[TextCondition, TextCondition | None]:
        """The encoded prompts and, if guidance is wanted, what it leads away from."""
        guided = settings.guide.scale != 1
        encoder, count = self.model.text, len(prompts)
        numbers = encoder.tokenise([*prompts, *against] if guided else list(prompts)).to(self.device)
        if encoder.frozen:  # a large one: each caption once
            numbers, row = numbers.unique(dim=0, return_inverse=True)
            text = TextCondition(*(part[row] for part in encoder(numbers)))
        else:
            text = encoder(numbers)
        text = TextCondition(text.tokens.to(self.dtype), text.mask, text.pooled.to(self.dtype))
        null = TextCondition(*(part[count:] for part in text)) if guided else None
        return TextCondition(*(part[:count] for part in text)), null

    def _sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        sides = self.size if height is None else height, self.size if width is None else width
        factor = self.latent.factor
        for name, side in zip(("height", "width"), sides, strict=True):
            if side < 1 or side % factor:
                raise SettingError(f"{name}={side} must be a positive multiple of {factor}, the latent's factor")
        return sides

    def _start(self, count: int, height: int, width: int, source: Noise, given: Tensor | None = None) -> Tensor:
        """Unit noise [count, C, h, w]: what was given, or from ``source``."""
        shape = (count, self.latent.channels, *self.latent.grid(height, width))
        noise = source(shape, None) if given is None else given
        if tuple(noise.shape) != shape:
            raise SettingError(f"latents must be {list(shape)}, got {list(noise.shape)}")
        return noise.to(self.device, working_dtype(self.dtype))

    def _picture(
        self, image: Any, mask: Any, strength: float | None, count: int, each: int, height: int, width: int
    ) -> Picture | None:
        if image is None:
            if mask is not None or strength is not None:
                raise SettingError(f"{'strength' if mask is None else 'mask_image'} needs an image")
            return None
        if strength is None:
            strength = STRENGTH if mask is None else 1.0
        images = _one_for_each("image", read_images(image, height, width), count, each).to(self.device)
        if mask is not None:
            mask = _one_for_each("mask_image", read_mask(mask, height, width), count, each).to(self.device)
        return Picture(images, self._encode(images), strength, mask)

    def _encode(self, images: Tensor) -> Tensor:
        return self.latent.encode(images.to(self.latent.mean)).to(working_dtype(self.dtype))

    def _decode(self, z: Tensor) -> Tensor:
        return self.latent.decode(z.to(self.latent.mean.dtype)).float()

    def _output(self, z: Tensor, kind: str, picture: Picture | None) -> list[Image.Image] | np.ndarray | Tensor:
        if kind == "latent":
            return z
        images = self._decode(z)
        if picture is not None:
            images = picture.finish(images)
        if kind == "pil":
            return [Image.fromarray(pixels) for pixels in to_pixels(images).cpu().numpy()]
        images = (images + 1) / 2
        return images if kind == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

    def save(self, folder: Path) -> None:
        """Write config.json and weights to ``folder``; pretrained parts are named, not copied."""
        write_folder(folder, self.parts)

    def save_pretrained(
        self, save_directory: str | Path, *, include_text_encoder: bool = False, **hub: Any
    ) -> str | None:
        """``save`` and a model card, README.md.

        Args:
            save_directory: the folder.
            include_text_encoder: copy a pretrained one as well, so that the folder needs nothing else.
            hub: see ``huggingface_hub.ModelHubMixin.save_pretrained``.
        """
        with self._copying_text(include_text_encoder):
            return super().save_pretrained(save_directory, **hub)

    def push_to_hub(self, repo_id: str, *, include_text_encoder: bool = False, **hub: Any) -> str:
        """Upload what ``save_pretrained`` writes; returns the commit's address.

        A text encoder that came from a folder of this machine is included, since nobody else could find it.

        Args:
            repo_id: owner/name.
            include_text_encoder: see ``save_pretrained``.
            hub: see ``huggingface_hub.ModelHubMixin.push_to_hub``.

        Raises:
            SettingError: the latent came from such a folder.
        """
        local = self.parts.folders
        if "latent.source" in local:
            raise SettingError(
                f"latent.source={local['latent.source']} is a folder of this machine; push its "
                "autoencoder and give its hub name"
            )
        hub["model_card_kwargs"] = {"name": repo_id} | (hub.get("model_card_kwargs") or {})
        with self._copying_text(include_text_encoder or "model.text_source" in local):
            return super().push_to_hub(repo_id, **hub)

    @contextmanager
    def _copying_text(self, wanted: bool) -> Iterator[None]:
        """The mixin's methods end in ``_save_pretrained``, which takes the folder alone."""
        before = self._copies_text
        self._copies_text = before or wanted
        try:
            yield
        finally:
            self._copies_text = before

    def _save_pretrained(self, save_directory: Path) -> None:
        write_folder(save_directory, self.parts, self._copies_text)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card, from ``iris.model.CARD``."""
        return super().generate_model_card(*args, **self.parts.facts() | kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> IrisPipeline:
        """A pipeline from a folder that ``save_pretrained`` or a trial wrote, or from a name on the Hugging Face hub.

        The mixin's own method would read config.json before it is known to be one, and fail without naming it.

        Raises:
            SettingError: neither a folder nor a name that can be had; a file is missing or not readable.
        """
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir() and is_hub_name(pretrained_model_name_or_path):
            folder = fetch_pipeline(
                pretrained_model_name_or_path,
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        pipeline = cls(*read_folder(folder))
        return pipeline if torch_dtype is None else pipeline.to(dtype=torch_dtype)


def _texts(name: str, given: str | Sequence[str], count: int | None, each: int) -> list[str]:
    """``given`` as a list, ``each`` times one after another; one text serves all ``count`` prompts."""
    if each < 1:
        raise SettingError(f"num_images_per_prompt={each} must be at least 1")
    texts = [given] * (count or 1) if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise SettingError(f"{name} must be a text or a list of texts, got {given!r}")
    if count is not None and len(texts) != count:
        raise SettingError(f"{name}: {len(texts)} texts for {count} prompts")
    return [text for text in texts for _ in range(each)]


def _one_for_each(name: str, pictures: Tensor, count: int, each: int) -> Tensor:
    """One picture for all ``count`` images, or one for each prompt, which has ``each`` images."""
    if len(pictures) == 1:
        return pictures.expand(count, -1, -1, -1)
    if len(pictures) * each != count:
        raise SettingError(f"{name}: {len(pictures)} pictures for {count // each} prompts")
    return pictures.repeat_interleave(each, 0)
