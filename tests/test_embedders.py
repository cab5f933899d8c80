import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tercet.core.data.embedders import (
    Encoder,
    embedder,
    folder_embedder,
    vision_tower_embedder,
)
from tercet.core.models import FAMILIES, build_tiny

pytestmark = pytest.mark.core

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50000,
    "max_position_embeddings": 8,
}


def noise_photos(folder, sizes):
    rng = np.random.default_rng(0)
    keys = []
    for index, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        keys.append(str(folder / f"{index}.png"))
        Image.fromarray(pixels).save(keys[-1])
    return keys


def channels_first(key, size, mean, std):
    image = Image.open(key).resize((size, size), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image, dtype=np.float64) / 255 - mean) / std
    return torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_tower_embedding_is_the_mean_or_the_extremes_of_each_photos_tokens(tmp_path, architecture):
    parts = build_tiny(["a bird"], architecture=architecture)
    keys = noise_photos(tmp_path, [(60, 40), (112, 112), (30, 90), (1, 1), (50, 3), (64, 64)])
    embedded = vision_tower_embedder(parts.model, parts.image_processor)(keys)
    assert embedded.dtype == torch.float32 and not embedded.requires_grad
    extremes = embedder("policy_extremes", lambda: parts)(keys)
    for key, row, ends in zip(keys, embedded, extremes, strict=True):
        pixels = np.asarray(Image.open(key).convert("RGB"))
        arrays = parts.image_processor(
            pixels, return_tensors="pt", input_data_format="channels_last"
        )
        with torch.no_grad():
            tower = parts.model.model.visual(
                arrays["pixel_values"], grid_thw=arrays["image_grid_thw"]
            )
        tokens = tower.pooler_output
        assert len(tokens) == int(arrays["image_grid_thw"].prod()) // 4
        torch.testing.assert_close(row, tokens.mean(dim=0), rtol=1e-4, atol=1e-5)
        columns = [sorted(column) for column in tokens.T.tolist()]
        expected = torch.tensor([c[-1] for c in columns] + [c[0] for c in columns])
        torch.testing.assert_close(ends, expected, rtol=1e-4, atol=1e-5)
    assert (embedded[0] - embedded[1]).abs().max() > 1e-2


def test_siglip_vision_folder_gives_its_pooled_output(tmp_path):
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**TOWER)).eval()
    model.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    keys = noise_photos(tmp_path, [(40, 30), (32, 32), (1, 1), (20, 3)] + [(9, 9)] * 30)
    embedded = folder_embedder(str(tmp_path))(keys)
    assert embedded.shape == (34, 16)
    for index in (0, 1, 2, 3, 33):
        with torch.no_grad():
            expected = model(channels_first(keys[index], 32, 0.5, 0.5)).pooler_output[0]
        torch.testing.assert_close(embedded[index], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_tower_folder_gives_its_image_features(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "clip":
        config = CLIPConfig(vision_config=TOWER, text_config=TEXT, projection_dim=12)
        model, mean, std = CLIPModel(config).eval(), 0.25, 0.5
        processor = CLIPImageProcessorPil(
            size={"height": 32, "width": 32},
            do_center_crop=False,
            image_mean=[mean] * 3,
            image_std=[std] * 3,
        )
    else:
        model, mean, std = (
            SiglipModel(SiglipConfig(vision_config=TOWER, text_config=TEXT)),
            0.5,
            0.5,
        )
        processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    keys = noise_photos(tmp_path, [(40, 30), (32, 32)])
    embedded = folder_embedder(str(tmp_path))(keys)
    for key, row in zip(keys, embedded, strict=True):
        with torch.no_grad():
            pooled = model.vision_model(channels_first(key, 32, mean, std)).pooler_output
            expected = model.visual_projection(pooled)[0] if kind == "clip" else pooled[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_layer_embeds_by_the_mean_of_its_patches(tmp_path, architecture):
    parts = build_tiny(["a bird"], architecture=architecture)
    keys = noise_photos(tmp_path, [(60, 40), (112, 112), (30, 90), (1, 1), (64, 64)])
    tower = parts.model.model.visual
    first, last = (
        vision_tower_embedder(parts.model, parts.image_processor, layer=layer) for layer in (0, -1)
    )
    assert first.layers == len(tower.blocks) == 3
    found = {}
    for n in (0, 2):
        tower.blocks[n].register_forward_hook(lambda *a, n=n: found.__setitem__(n, a[2]))
    embedded = first(keys), last(keys)
    for place, key in enumerate(keys):
        pixels = np.asarray(Image.open(key).convert("RGB"))
        arrays = parts.image_processor(
            pixels, return_tensors="pt", input_data_format="channels_last"
        )
        with torch.no_grad():
            tower(arrays["pixel_values"], grid_thw=arrays["image_grid_thw"])
        for rows, n in zip(embedded, (0, 2), strict=True):
            expected = found[n].mean(dim=0)
            torch.testing.assert_close(rows[place], expected, rtol=1e-4, atol=1e-5)
    both = first.of_layers(keys, [None, 0])
    assert torch.equal(both[1], embedded[0])
    assert torch.equal(both[0], vision_tower_embedder(parts.model, parts.image_processor)(keys))
    with pytest.raises(ValueError, match="data.embedder_layer must be under 3, .* -3 to -1, got 3"):
        vision_tower_embedder(parts.model, parts.image_processor, layer=3)


def test_a_layer_of_a_folder_is_the_mean_of_its_hidden_states(tmp_path):
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=TOWER, text_config=TEXT, projection_dim=12)).eval()
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size=size, do_center_crop=False).save_pretrained(tmp_path)
    keys = noise_photos(tmp_path, [(40, 30), (32, 32)])
    embed = folder_embedder(str(tmp_path), layer=1)
    pixels = CLIPImageProcessorPil(size=size, do_center_crop=False)(
        [Image.open(key) for key in keys], return_tensors="pt"
    )
    with torch.no_grad():
        states = model.vision_model(**pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(embed(keys), states[2].mean(dim=1), rtol=1e-4, atol=1e-5)
    assert embed.layers == 2


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The photos of all forward passes."""
    made, of_layers = [], Encoder.of_layers
    monkeypatch.setattr(
        Encoder,
        "of_layers",
        lambda self, keys, layers: made.extend(keys) or of_layers(self, keys, layers),
    )
    return made


def test_a_photo_is_embedded_once_until_it_changes(tmp_path, monkeypatch, passes):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "kept"))
    keys = noise_photos(tmp_path, [(60, 40), (30, 90), (64, 64)])
    copy = str(tmp_path / "copy.png")
    shutil.copy(keys[0], copy)

    def start(name="policy", seed=0, **more):
        passes.clear()
        return embedder(name, lambda: build_tiny(["a bird"], seed=seed), **more)([*keys, copy])

    first = start()
    assert passes == [copy, *keys[1:]] or passes == keys
    assert torch.equal(first[0], first[3])
    assert torch.equal(start(), first) and passes == []
    Image.new("RGB", (50, 50), "red").save(keys[1])
    changed = start()
    assert passes == [keys[1]] and torch.equal(changed[[0, 2, 3]], first[[0, 2, 3]])
    parts = build_tiny(["a bird"])
    exact = vision_tower_embedder(parts.model, parts.image_processor)(keys[1:2])
    torch.testing.assert_close(changed[1:2], exact)
    # Another tower, pooling, layer or size is another embedder.
    for other in ({"seed": 1}, {"name": "policy_extremes"}, {"layer": 1}):
        start(**other)
        assert len(passes) == 3
        start(**other)
        assert passes == []
    with pytest.raises(ValueError, match="a photo cannot be read: .*gone.png"):
        embedder("policy", lambda: build_tiny(["a bird"]))([str(tmp_path / "gone.png")])
    monkeypatch.setattr("tercet.core.data.embedders.KEPT_AT_ONCE", 1)
    assert torch.equal(start(), changed) and passes == []


def test_without_a_place_to_keep_them_photos_are_embedded_each_time(tmp_path, monkeypatch, passes):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "file" / "kept"))
    keys = noise_photos(tmp_path, [(60, 40)])
    embed = embedder("policy", lambda: build_tiny(["a bird"]))
    for count in (1, 2):
        with pytest.warns(UserWarning, match="kept cannot be written, embeddings and checks"):
            embed(keys)
        assert len(passes) == count
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path))
    (tmp_path / "embeddings.sqlite").write_text("no database at all, but a text" * 99)
    with pytest.raises(ValueError, match="embeddings.sqlite cannot be used: .*may be removed"):
        embed(keys)


def test_a_folder_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="data.embedder .*nowhere"):
        folder_embedder(str(tmp_path / "nowhere"))


def test_the_policy_is_loaded_only_when_photos_are_embedded(tmp_path):
    parts = build_tiny(["a bird"])
    keys = noise_photos(tmp_path, [(60, 40)])
    calls = []

    def policy():
        calls.append(1)
        return parts

    embed = embedder("policy", policy)
    assert calls == []
    expected = vision_tower_embedder(parts.model, parts.image_processor)(keys)
    assert torch.equal(embed(keys), expected) and torch.equal(embed(keys), expected)
    assert calls == [1]
    with pytest.raises(ValueError, match="nowhere"):
        embedder(str(tmp_path / "nowhere"), policy)(keys)
    assert calls == [1]
