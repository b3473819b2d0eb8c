"""A CLIP of some thousand random parameters, saved as the real ones are: weights, configuration and tokenizer files."""

import json
import string

import torch

LENGTH, WIDTH = 77, 16
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["r e", "re d</w>", "c i", "ci r"]
LETTERS = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
VOCABULARY = [*LETTERS, *(merge.replace(" ", "") for merge in MERGES), START, END]
SHAPE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
}


def token(name):
    """The number of a token."""
    return VOCABULARY.index(name)


def text_config(end=None, **changes):
    """``end`` None: as in today's files; 2: as in the hub's ViT-L/14."""
    from transformers import CLIPTextConfig

    end = token(END) if end is None else end
    special = {"bos_token_id": token(START), "pad_token_id": token(END), "eos_token_id": end}
    return CLIPTextConfig(**(SHAPE | special | changes))


def save_tokenizer(folder):
    """The files of a CLIP tokenizer, by hand; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return folder


def save_clip(folder, seed=0, **config):
    """A CLIP text model and its tokenizer in one folder, which is returned."""
    from transformers import CLIPTextModel

    save_model(CLIPTextModel, text_config(**config), folder, seed)
    return save_tokenizer(folder)


def save_model(kind, config, folder, seed=0):
    """A transformers model with random weights large enough to tell tokens apart; returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model
