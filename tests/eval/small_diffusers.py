"""A Stable Diffusion pipeline of some ten thousand random parameters, saved as the real ones are."""

import torch

SIZE, WIDTH = 32, 16  # pixels a side; width of the text encoder


def save_diffusers(folder, seed=0):
    """Write the pipeline to ``folder``, which is returned; its images are 32x32 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from small_clip import LENGTH, save_tokenizer, text_config
    from transformers import CLIPTextModel, CLIPTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=SIZE // 2,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            attention_head_dim=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            norm_num_groups=4,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=SIZE,
        )
        text = CLIPTextModel(text_config()).eval()
    files = save_tokenizer(folder.parent / f"{folder.name}_tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(files, model_max_length=LENGTH)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
