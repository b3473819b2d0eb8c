"""Small weights files in the formats of the real ones, with random values, for the tests of judges."""

import copy
import json
import warnings
from pathlib import Path

import open_clip
import torch
from torch import nn
from torch.nn import functional as F

INCEPTION_FEATURES = 32  # of the 2048, those that are not zero in `inception_archive`
TINY = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class _Layers(nn.Module):
    """[N, 3, 299, 299] -> [N, width, 1, 1], zero from the 33rd feature on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, 16, 9, stride=6)
        self.head = nn.Conv2d(16, INCEPTION_FEATURES, 5, stride=3)

    def forward(self, x):
        x = F.silu(self.head(F.silu(self.stem(x)))).mean([2, 3])
        return F.pad(x, [0, self.width - x.shape[1]]).unsqueeze(2).unsqueeze(3)


class _Inception(nn.Module):
    """The interface of inception-2015-12-05.pt: ``layers``, and a forward that resizes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = _Layers(width)
        self.output = nn.Linear(width, 1008)

    def forward(self, img, return_features: bool = False):
        x = F.interpolate(img.to(torch.float32), size=(299, 299), mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128).flatten(1)
        return features if return_features else self.output(features).softmax(1)


def inception_archive(path: Path, seed: int = 0, width: int = 2048) -> Path:
    """A TorchScript archive with the interface of clean-fid's Inception."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        torch.jit.script(_Inception(width).eval()).save(path)
    return path


def clip_network(config: dict, seed: int = 0) -> nn.Module:
    """A CLIP of open_clip with random weights."""
    config = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(**config).eval().requires_grad_(False)


def openai_archive(network: nn.Module, path: Path) -> Path:
    """A TorchScript archive as OpenAI's: traced, in half precision, with three sizes among its tensors."""
    side = network.visual.image_size[0]
    sizes = {"input_resolution": side, "context_length": network.context_length, "vocab_size": network.vocab_size}
    network = copy.deepcopy(network)
    for name, value in sizes.items():
        network.__dict__.pop(name, None)
        network.register_buffer(name, torch.tensor(value))
    mask = network._buffers.pop("attn_mask")  # a constant in OpenAI's
    network.attn_mask = mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.zeros(1, 3, side, side), torch.zeros(1, sizes["context_length"], dtype=torch.long)
        torch.jit.trace(network, example, check_trace=False).half().save(path)
    return path


def clip_folder(network: nn.Module, config: dict, folder: Path, **preprocess) -> Path:
    """A folder as open_clip pushes it to the Hub."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder
