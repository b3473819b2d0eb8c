"""CLIP's text model: the same numbers as transformers', from every layout of files; errors say what is missing."""

import logging
import time

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from small_clip import END, LENGTH, START, VOCABULARY, WIDTH, save_clip, save_model, save_tokenizer, text_config, token

from iris.errors import SettingError
from iris.text import CLIPText, build_text_encoder
from iris.text.clip import VIT_L_14, shape_only

CAPTIONS = ["a red circle", "", "Red", "b " * 200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    return tmp_path / "hub"


@pytest.fixture
def online(offline, monkeypatch):
    """An empty hub cache, and a hub that has no repository; returns the list of questions it was asked."""
    asked = []

    def ask(self, name, timeout=None, **_):
        asked.append((name, timeout))
        raise OSError("no such repository")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    return asked


def put_in_cache(hub, name, save=save_clip):
    """Save into the hub cache as a download of ``name`` would."""
    repository = hub / ("models--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return save(repository / "snapshots" / "abc")


def save_pipeline(folder):
    """The text part of a diffusers pipeline's folder."""
    save_model(transformers.CLIPTextModel, text_config(), folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")
    return folder


def direct(folder, captions):
    """transformers' own tokenizer and model on ``captions``."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    rows = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    numbers = rows.input_ids
    with torch.no_grad():
        return numbers, transformers.CLIPTextModel.from_pretrained(folder).eval()(input_ids=numbers)


def test_encoding_is_transformers_own(folder):
    encoder = CLIPText(str(folder))
    numbers, expected = direct(folder, CAPTIONS)
    assert torch.equal(encoder.tokenise(CAPTIONS), numbers)
    text = encoder(numbers)
    assert torch.equal(text.tokens, expected.last_hidden_state) and torch.equal(text.pooled, expected.pooler_output)
    assert text.tokens.shape == (4, LENGTH, WIDTH) and (encoder.length, encoder.width) == (LENGTH, WIDTH)
    assert text.mask.shape == (4, LENGTH) and text.mask.all()


def test_tokens_are_after_the_final_norm(folder):
    text = CLIPText(str(folder))
    inner = text.model(input_ids=text.tokenise(CAPTIONS), output_hidden_states=True).hidden_states[-1]
    norm = text.model.final_layer_norm
    centred = inner.double() - inner.double().mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    tokens = text(text.tokenise(CAPTIONS)).tokens
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=1e-5)
    assert (tokens - inner).abs().max() > 0.1


def test_captions_are_numbered_padded_and_cut(folder):
    rows = CLIPText(str(folder)).tokenise(["Red  cat", "", "b " * 200])
    red, start, end = token("red</w>"), token(START), token(END)
    assert rows.dtype == torch.int64 and rows.shape == (3, LENGTH)
    assert rows[0].tolist() == [start, red, token("c"), token("a"), token("t</w>")] + [end] * (LENGTH - 5)
    assert rows[1].tolist() == [start] + [end] * (LENGTH - 1)
    assert rows[2].tolist() == [start] + [token("b</w>")] * (LENGTH - 2) + [end]


@pytest.mark.parametrize("end", [None, 2])
def test_pooled_is_the_first_end_token(tmp_path, end):
    encoder = CLIPText(str(save_clip(tmp_path, end=end)))
    numbers = encoder.tokenise(CAPTIONS)
    text = encoder(numbers)
    for i, row in enumerate(numbers.tolist()):
        assert torch.equal(text.pooled[i], text.tokens[i, row.index(token(END))])
    assert (text.tokens[0, -1] - text.pooled[0]).abs().max() > 1e-3


def test_a_caption_does_not_depend_on_its_batch(folder):
    encoder = CLIPText(str(folder))
    together, alone = encoder(encoder.tokenise(CAPTIONS)), encoder(encoder.tokenise(CAPTIONS[:1]))
    torch.testing.assert_close(alone.tokens, together.tokens[:1], rtol=0, atol=1e-5)
    assert (together.tokens[0] - together.tokens[2]).abs().max() > 0.1


def test_it_is_never_trained(folder):
    encoder = CLIPText(str(folder)).train()
    assert encoder.frozen and not any(part.training for part in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.requires_grad_(True)  # as a caller may do to a whole model
    text = encoder(encoder.tokenise(CAPTIONS))
    assert not text.tokens.requires_grad and not text.pooled.requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_half_precision(folder, dtype, tolerance):
    encoder, exact = CLIPText(str(folder), dtype), CLIPText(str(folder))
    numbers = exact.tokenise(CAPTIONS)
    text = encoder(numbers)
    assert text.tokens.dtype == text.pooled.dtype == getattr(torch, dtype)
    assert all(p.dtype == getattr(torch, dtype) for p in encoder.parameters())
    torch.testing.assert_close(text.tokens.float(), exact(numbers).tokens, rtol=0, atol=tolerance)


def test_a_whole_clip_gives_its_text_part(tmp_path):
    """As the hub's openai/clip-vit-large-patch14 is: text and vision in one file, one configuration in the other."""
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.CLIPConfig(text_config=text_config(end=2).to_dict(), vision_config=vision, projection_dim=5)
    whole = save_model(transformers.CLIPModel, config, save_tokenizer(tmp_path))
    encoder = CLIPText(str(tmp_path))
    numbers = encoder.tokenise(CAPTIONS)
    with torch.no_grad():
        expected = whole.text_model(input_ids=numbers)
    assert torch.equal(encoder(numbers).tokens, expected.last_hidden_state)
    assert torch.equal(encoder(numbers).pooled, expected.pooler_output)
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in whole.text_model.parameters())


def test_loading_says_nothing(tmp_path, capfd):
    """transformers reports the vision weights that are left as unexpected, and may show a progress bar."""
    from safetensors.torch import load_file, save_file

    path = save_clip(tmp_path) / "model.safetensors"
    save_file(load_file(path) | {"vision_model.post_layernorm.weight": torch.ones(3)}, path, {"format": "pt"})
    logger, records = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    level = logger.level
    capfd.readouterr()
    try:
        transformers.CLIPTextModel.from_pretrained(tmp_path)
        assert records
        records.clear()
        capfd.readouterr()
        CLIPText(str(tmp_path))
        assert not records and capfd.readouterr() == ("", "")
    finally:
        logger.removeHandler(handler)
    assert logger.level == level


def test_a_pipelines_folder_gives_its_text_encoder(tmp_path, folder):
    one, other = CLIPText(str(save_pipeline(tmp_path))), CLIPText(str(folder))
    numbers = one.tokenise(CAPTIONS)
    assert torch.equal(one(numbers).tokens, other(numbers).tokens)


@pytest.mark.parametrize("save", [save_clip, save_pipeline])
def test_a_hub_name_is_read_from_the_cache(offline, save):
    put_in_cache(offline, "org/tiny", save)
    encoder = CLIPText("org/tiny")
    assert encoder(encoder.tokenise(["a"])).tokens.isfinite().all()


def test_the_cache_comes_before_the_hub(online, offline):
    put_in_cache(offline, "org/tiny")
    CLIPText("org/tiny")
    assert online == []


def test_the_hub_is_asked_for_what_the_cache_lacks(online, offline, monkeypatch):
    def download(name, allow_patterns, **_):
        assert {"config.json", "model.safetensors", "text_encoder/model.safetensors"} < set(allow_patterns)
        return str(save_clip(offline / "elsewhere"))

    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, name, timeout, **_: online.append((name, timeout))
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (put_in_cache(offline, "org/tiny") / "model.safetensors").unlink()
    CLIPText("org/tiny")
    assert [name for name, _ in online] == ["org/tiny"] and online[0][1] <= 10


def test_offline_an_unknown_name_is_an_error_at_once(offline):
    started = time.monotonic()
    with pytest.raises(SettingError, match="text_source='openai/clip-vit-large-patch14'.*HF_HUB_OFFLINE") as error:
        CLIPText()
    assert time.monotonic() - started < 5
    for named in ("config.json", "model.safetensors", "merges.txt", "text_encoder/", str(offline)):
        assert named in str(error.value)


def test_what_the_hub_answers_is_in_the_error(online):
    with pytest.raises(SettingError, match="model.text_source='org/none'.*no such repository"):
        CLIPText("org/none")
    assert len(online) == 1


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "not a name!"])
def test_what_is_no_folder_and_no_name_is_refused(online, name):
    with pytest.raises(SettingError, match="model.text_source=.*neither a folder nor a hub name"):
        CLIPText(name)
    assert online == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "merges.txt"])
def test_missing_files_are_named(tmp_path, name):
    (save_clip(tmp_path) / name).unlink()
    with pytest.raises(SettingError, match=f"model.text_source=.*lacks {name}"):
        CLIPText(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_damaged_files_are_refused(tmp_path, name):
    path = save_clip(tmp_path) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SettingError, match="model.text_source=.*not readable"):
        CLIPText(str(tmp_path))


def test_weights_of_another_model_are_refused(tmp_path):
    """transformers fills what it does not find with random numbers, and says so in a report that nobody reads."""
    from safetensors.torch import load_file, save_file

    path = save_clip(tmp_path) / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if ".layers.1." not in name}, path, {"format": "pt"})
    with pytest.raises(SettingError, match="model.text_source=.*no whole CLIP text model"):
        CLIPText(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"), [({"vocab_size": len(VOCABULARY) - 1}, "numbers up to"), ({"end": 7}, "ends captions with")]
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(SettingError, match=f"model.text_source=.*{message}"):
        CLIPText(str(save_clip(tmp_path, **changes)))


def test_unknown_dtype(folder):
    with pytest.raises(SettingError, match="model.text_dtype='int8' is unknown; allowed: float32, float16, bfloat16"):
        CLIPText(str(folder), "int8")


def test_it_comes_back_from_its_dict_and_from_its_own_files(folder, tmp_path):
    encoder = CLIPText(str(folder), "bfloat16")
    assert encoder.to_dict() == {"name": "clip", "source": str(folder), "dtype": "bfloat16"}
    encoder.save(tmp_path)
    numbers = encoder.tokenise(CAPTIONS)
    for other in (build_text_encoder(encoder.to_dict()), CLIPText(str(tmp_path), "bfloat16")):
        assert torch.equal(other.tokenise(CAPTIONS), numbers)
        assert torch.equal(other(numbers).tokens, encoder(numbers).tokens)
        assert other.fingerprint() == encoder.fingerprint()


def test_fingerprints_tell_weights_dtypes_and_shapes_apart(folder, tmp_path):
    made = [
        CLIPText(str(folder)),
        CLIPText(str(folder), "float16"),
        CLIPText(str(save_clip(tmp_path / "a", seed=1))),
        CLIPText(str(save_clip(tmp_path / "b", hidden_act="gelu"))),
    ]
    assert len({encoder.fingerprint() for encoder in made}) == 4


def test_weights_stay_out_of_state_dicts(folder):
    """They come from ``source``: checkpoints stay small, and embeddings on disk can stand in for the encoder."""
    encoder = CLIPText(str(folder))
    model = torch.nn.ModuleDict({"text": encoder, "other": torch.nn.Linear(2, 2)})
    assert set(model.state_dict()) == {"other.weight", "other.bias"}
    before = encoder(encoder.tokenise(CAPTIONS)).tokens
    model.load_state_dict({"other.weight": torch.ones(2, 2), "other.bias": torch.zeros(2)})
    assert model["other"].weight.sum() == 4 and torch.equal(encoder(encoder.tokenise(CAPTIONS)).tokens, before)
    with pytest.raises(RuntimeError, match="other.bias"):
        model.load_state_dict({"other.weight": torch.ones(2, 2)})


def test_vit_l_14_has_the_published_size():
    model = shape_only()
    assert sum(p.numel() for p in model.parameters()) == 123_060_480
    assert all(p.is_meta for p in model.parameters())
    assert (model.config.hidden_size, model.config.max_position_embeddings) == (768, 77)
    assert set(VIT_L_14) <= set(model.config.to_dict())
