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

from tercet.core.data.embedders import embedder, folder_embedder, vision_tower_embedder
from tercet.core.models import build_tiny

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


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl"])
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
    assert torch.equal(embed(keys), expected) and calls == [1]
    with pytest.raises(ValueError, match="nowhere"):
        embedder(str(tmp_path / "nowhere"), policy)(keys)
    assert calls == [1]
