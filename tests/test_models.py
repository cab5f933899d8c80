"""Policies that are built, saved and loaded, against plain transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import TEXTS, tiny
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    InternVLConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3VLMoeConfig,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tercet.core.config import ModelConfig
from tercet.core.data.vision import PromptEncoder
from tercet.core.models import build_tiny, checkpoint_names, freeze, load_policy
from tercet.core.types import PolicyParts

pytestmark = pytest.mark.core

LIMITS = {  # 8 to 16 tokens of 28 x 28 or 32 x 32 pixels
    "qwen2_vl": (6272, 12544),
    "qwen2_5_vl": (6272, 12544),
    "qwen3_vl": (8192, 16384),
}
TEXT = "What bird is this?"
RENDERED = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" + TEXT + "<|im_end|>\n"
    "<|im_start|>assistant\n"
)
WITHOUT_SYSTEM = RENDERED.partition("<|im_end|>\n")[2]  # Qwen3-VL's template adds no system turn
ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}


@pytest.fixture
def folder(parts, tmp_path) -> Path:
    """The tiny policy of `parts`, saved."""
    parts.save(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def one_folder(tmp_path) -> Path:
    tiny().save(tmp_path / "policy")
    return tmp_path / "policy"


def load(folder: Path, **options) -> PolicyParts:
    return load_policy(ModelConfig(path=str(folder), **options))


def assert_equal_weights(one, other) -> None:
    names = dict(one.named_parameters())
    assert names.keys() == dict(other.named_parameters()).keys() and len(names) > 50
    for name, parameter in other.named_parameters():
        assert parameter.dtype == names[name].dtype and torch.equal(parameter, names[name]), name


def head_is_tied(model) -> bool:
    return model.lm_head.weight is model.get_input_embeddings().weight


# building, saving, loading


def test_saved_policy_loads_bit_equal(parts, folder):
    loaded = load(folder)
    assert_equal_weights(parts.model, loaded.model)
    assert not loaded.model.training and head_is_tied(loaded.model)
    assert loaded.tokenizer.get_vocab() == parts.tokenizer.get_vocab()
    fewest, most = LIMITS[parts.model.config.model_type]
    assert dict(loaded.image_processor.size) == {"shortest_edge": fewest, "longest_edge": most}
    assert loaded.stop_ids == parts.stop_ids == (2, 0)
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.stop_ids) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    pads = ["<|image_pad|>", "<|video_pad|>"]
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.banned_ids) == pads


def test_saved_policy_loads_by_plain_transformers(parts, folder, photos):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(model) is type(parts.model) and head_is_tied(model)
    assert_equal_weights(parts.model, model)
    text = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text).input_ids
    prompt = PromptEncoder(parts)(tuple(ids), (photos[0],))
    photo = processor(images=[photos[0]], return_tensors="pt")
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    pads = int(photo["image_grid_thw"].prod()) // 4
    inputs = torch.tensor([[i for token in ids for i in [token] * (pads if token == pad else 1)]])
    with torch.no_grad():
        plain = model(input_ids=inputs, mm_token_type_ids=(inputs == pad).int(), **photo).logits
        ours = parts.model(
            input_ids=prompt.input_ids[None],
            position_ids=prompt.position_ids[:, None],
            pixel_values=prompt.images[0].pixel_values,
            image_grid_thw=prompt.images[0].grid_thw,
        ).logits
    assert torch.equal(plain, ours) and plain.std() > 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_dtype_and_tied_head(tmp_path, tied, dtype):
    parts = tiny(tie_word_embeddings=tied)
    parts.save(tmp_path / "policy")
    loaded = load(tmp_path / "policy", dtype=dtype).model
    stored = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    for name, parameter in parts.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(stored))
        assert loaded.get_parameter(name).dtype == stored
    assert head_is_tied(loaded) == tied == head_is_tied(parts.model)
    assert ("lm_head.weight" in dict(loaded.named_parameters())) != tied
    with torch.no_grad():
        loaded.get_input_embeddings().weight.zero_()
    assert (loaded.lm_head.weight == 0).all() == tied


def test_auto_dtype_keeps_what_is_stored(tmp_path):
    parts = tiny()
    parts.model.to(torch.bfloat16)
    parts.save(tmp_path / "policy")
    loaded = load(tmp_path / "policy", dtype="auto").model
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert_equal_weights(parts.model, loaded)


def test_seed_alone_decides_the_weights():
    state = torch.random.get_rng_state()
    first, second, other = (build_tiny(TEXTS, hidden_size=64, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_equal_weights(first.model, second.model)
    embeddings = [p.model.get_input_embeddings().weight for p in (first, other)]
    assert not torch.equal(*embeddings)
    assert embeddings[0].std().item() == pytest.approx(0.08, rel=0.05)


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("merger", [True, False])
def test_frozen_parts(parts, folder, vision, merger):
    loaded = load(folder, freeze_vision=vision, freeze_merger=merger).model
    groups = {"tower": [], "merger": [], "language": []}
    for name, parameter in loaded.named_parameters():
        tower = name.startswith("model.visual.")
        group = "merger" if "merger" in name else "tower" if tower else "language"
        groups[group].append(parameter.requires_grad)
    assert set(groups["tower"]) == {not vision}
    mergers = 3 if loaded.config.model_type == "qwen3_vl" else 1  # two of DeepStack's
    assert set(groups["merger"]) == {not merger} and len(groups["merger"]) >= 5 * mergers
    assert set(groups["language"]) == {True}
    freeze(loaded, vision=False, merger=False)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_processor_config_with_bare_pixel_limits(one_folder):
    """The released models' preprocessor_config.json has min_pixels and max_pixels, no size."""
    config = json.loads((one_folder / "preprocessor_config.json").read_text())
    del config["size"], config["min_pixels"], config["max_pixels"]
    config |= {"min_pixels": 3136, "max_pixels": 12845056}
    (one_folder / "preprocessor_config.json").write_text(json.dumps(config))
    assert load(one_folder).image_processor.size == {
        "shortest_edge": 3136,
        "longest_edge": 12845056,
    }
    limited = load(one_folder, max_pixels=1003520).image_processor.size
    assert limited == {"shortest_edge": 3136, "longest_edge": 1003520}


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        ({"min_pixels": 3136, "max_pixels": 50000}, None),  # of transformers 4.4x
        ({"height": 448, "width": 448}, "got None, None"),
        ({"shortest_edge": -5, "longest_edge": 12544}, "got -5, 12544"),
    ],
)
def test_pixel_limits_that_were_not_given_are_not_named(one_folder, size, complaint):
    config = json.loads((one_folder / "preprocessor_config.json").read_text())
    del config["min_pixels"], config["max_pixels"]
    (one_folder / "preprocessor_config.json").write_text(json.dumps(config | {"size": size}))
    if complaint is None:
        assert load(one_folder).image_processor.size == {
            "shortest_edge": 3136,
            "longest_edge": 50000,
        }
    else:
        match = rf"{one_folder}': min_pixels and max_pixels in its image processor .* {complaint}"
        with pytest.raises(ValueError, match=match):
            load(one_folder)
    assert load(one_folder, min_pixels=800, max_pixels=9000).image_processor.size == {
        "shortest_edge": 800,
        "longest_edge": 9000,
    }


# the tokenizer


def test_chat_template_is_qwens(parts, folder):
    for tokenizer in (parts.tokenizer, AutoTokenizer.from_pretrained(folder)):

        def render(*messages, prompt=True, tokenizer=tokenizer):
            return tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=prompt, tokenize=False
            )

        rendered = RENDERED if "2" in parts.model.config.model_type else WITHOUT_SYSTEM
        assert render(ASKED) == rendered
        plain = {"role": "user", "content": TEXT}
        images = "<|vision_start|><|image_pad|><|vision_end|>"
        assert render(plain) == rendered.replace(images, "")
        system = {"role": "system", "content": "Be brief."}
        brief = RENDERED.replace("You are a helpful assistant.", "Be brief.")
        assert render(system, ASKED) == brief
        said = {"role": "assistant", "content": "A wren."}
        assert render(ASKED, said, prompt=False) == rendered + "A wren.<|im_end|>\n"
        assert render(ASKED, said, plain) == (
            rendered + f"A wren.<|im_end|>\n<|im_start|>user\n{TEXT}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_special_tokens_are_single_ids(parts):
    ids = parts.tokenizer(RENDERED).input_ids
    special = {
        name: parts.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")
    }
    config = parts.model.config
    assert [ids.count(i) for i in special.values()] == [3, 2]
    assert ids.count(config.image_token_id) == ids.count(config.vision_start_token_id) == 1
    start = ids.index(config.vision_start_token_id)
    expected = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    assert ids[start : start + 3] == expected
    assert parts.tokenizer.decode(ids) == RENDERED
    bare = parts.tokenizer.decode(ids, skip_special_tokens=True)
    assert bare == f"system\nYou are a helpful assistant.\nuser\n{TEXT}\nassistant\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ,\n\n\ttab . don't stop !  ",
        "naïve café, cafe\u0301, ﬁ, \u00a0, \u200b, \u0000, \u2028, \ufeff, \ufffd",
        "灰头绿啄木鸟 ヤマガラ 참새 птица عصفور ציפור 🐦\u200d⬛ 👩🏽\u200d🔬 \U0010ffff",
        "<think>\nred\n</think>\n\n<answer>least auklet</answer>",
        "".join(map(chr, range(1, 0x250))),
    ],
)
def test_tokenizer_round_trip(one_folder, text):
    for tokenizer in (tiny().tokenizer, AutoTokenizer.from_pretrained(one_folder)):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids == tiny().tokenizer(text).input_ids


def test_tokenizer_keeps_to_its_size_and_learns():
    small, large = (build_tiny(TEXTS, hidden_size=64, vocabulary_size=n) for n in (263, 300))
    assert len(small.tokenizer) == 263 and len(large.tokenizer) == 300  # 256 bytes, 7 special
    assert large.model.get_input_embeddings().weight.shape == (300, 64)
    assert len(small.tokenizer("What bird").input_ids) == 9
    assert len(large.tokenizer("What bird").input_ids) < 9


# how an answer ends

IM_END, ENDOFTEXT = "<|im_end|>", "<|endoftext|>"


def write_generation_config(folder: Path, **content) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))


def set_field(folder: Path, file: str, **fields) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ([2, 0], None),
        (2, None),
        (
            [0, 2],
            r"generation_config names <\|endoftext\|>, <\|im_end\|>: answers to train on end ",
        ),
        (
            0,
            r"_config names <\|endoftext\|>: answers .* with <\|im_end\|>, sampling stops ",
        ),
        (None, "generation_config names none: answers"),
        ([], "generation_config names none: answers"),
    ],
)
def test_the_templates_end_of_turn_comes_first_and_every_end_stops(one_folder, named, said):
    write_generation_config(one_folder, eos_token_id=named, pad_token_id=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = load(one_folder)
        load_policy(ModelConfig(path=str(one_folder)), "meta")  # the other ranks say nothing
    lines = [str(w.message) for w in caught if str(one_folder) in str(w.message)]
    assert len(lines) == (said is not None)
    assert said is None or re.search(said, lines[0])
    assert parts.turn_end == parts.stop_ids[0] == 2
    assert parts.stop_ids == ((2, 0) if named in ([2, 0], [0, 2], 0) else (2,))
    parts.save(one_folder.with_name("again"))  # other software stops there as well
    saved = json.loads((one_folder.with_name("again") / "generation_config.json").read_text())
    assert saved["eos_token_id"] == (named if named in (2, [2, 0], [0, 2]) else [*parts.stop_ids])


def test_the_tokenizers_end_stops_as_well(one_folder):
    set_field(one_folder, "tokenizer_config.json", eos_token=ENDOFTEXT)
    write_generation_config(one_folder, eos_token_id=2)
    with pytest.warns(UserWarning, match=r"the tokenizer's end is <\|endoftext\|>"):
        assert load(one_folder).stop_ids == (2, 0)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m.content }}\n<|im_end|>\n{% endfor %}", IM_END),
        ("{% for m in messages %}{{ m.content + '<|endoftext|>' }}{% endfor %}", ENDOFTEXT),
        ("{% for m in messages %}<|im_start|>{{ m.content }}\n{% endfor %}", IM_END),  # eos_token
        (None, IM_END),
    ],
)
def test_end_of_turn_of_other_templates(template, end):
    parts = tiny()
    parts.tokenizer.chat_template = template
    assert parts.tokenizer.convert_ids_to_tokens(parts.turn_end) == end


def test_a_policy_without_an_end_is_named():
    parts = tiny()
    parts.tokenizer.eos_token = parts.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="neither the chat template nor the tokenizer"):
        _ = parts.turn_end
    parts = tiny()
    parts.tokenizer.chat_template = "{{ raise_exception('no assistant') }}"
    with pytest.raises(ValueError, match="chat template does not render .*: no assistant"):
        _ = parts.stop_ids


@pytest.mark.parametrize("wrong", [10**6, -1, True, 2.5])
def test_ends_outside_the_vocabulary_are_named(one_folder, wrong):
    write_generation_config(one_folder, eos_token_id=[2, wrong])
    with pytest.raises(ValueError, match=rf"{one_folder}.*(eos_token_id|cannot be loaded)"):
        load(one_folder)


# what is exported


@pytest.mark.parametrize("tied", [True, False])
def test_exports_name_what_transformers_4_reads(tmp_path, tied, parts):
    parts = tiny(parts.model.config.model_type, tie_word_embeddings=tied)
    fewest, most = LIMITS[parts.model.config.model_type]
    sections = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    if parts.model.config.model_type == "qwen3_vl":
        sections |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    parts.save(tmp_path / "one")
    load(tmp_path / "one").save(tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "two"):
        config, tokenizer, processor = (
            json.loads((folder / f"{name}config.json").read_text())
            for name in ("", "tokenizer_", "preprocessor_")
        )
        text = config["text_config"]
        assert (text["rope_theta"], text["rope_scaling"]) == (10000.0, sections)
        assert text["rope_parameters"] == sections | {"rope_theta": 10000.0}
        assert config["tie_word_embeddings"] is text["tie_word_embeddings"] is tied
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert tokenizer["additional_special_tokens"][:2] == [ENDOFTEXT, "<|im_start|>"]
        assert "extra_special_tokens" not in tokenizer
        assert (processor["min_pixels"], processor["max_pixels"]) == (fewest, most)
    again = load(tmp_path / "two")
    assert_equal_weights(again.model, parts.model)
    assert again.tokenizer.extra_special_tokens == parts.tokenizer.extra_special_tokens
    rope = again.model.config.text_config.rope_parameters
    assert rope == sections | {"rope_theta": 10000.0}


OLDER = """
import sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
folder, photo, asked = sys.argv[1:]
asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
photo = AutoImageProcessor.from_pretrained(folder, use_fast=False)(
    images=[Image.open(photo)], return_tensors="pt"
)
pad, pads = model.config.image_token_id, int(photo["image_grid_thw"].prod()) // 4
ids = torch.tensor([[i for token in ids for i in [token] * (pads if token == pad else 1)]])
given = {"attention_mask": torch.ones_like(ids), **photo}
with torch.no_grad():
    logits = model(input_ids=ids, **given).logits[0]
    said = model.generate(input_ids=ids, do_sample=False, max_new_tokens=12, **given)
torch.save({"ids": ids[0], "logits": logits, "said": said[0, ids.shape[1] :]}, folder + "/found.pt")
"""


@pytest.mark.parametrize("tied", [True, False])
def test_exports_are_the_same_policy_in_transformers_4(tmp_path, photos, parts, tied):
    """TERCET_TRANSFORMERS_4: `pip install --no-deps --target FOLDER` of it, tokenizers and hub."""
    packages = os.environ.get("TERCET_TRANSFORMERS_4")
    if not packages:
        pytest.skip("set TERCET_TRANSFORMERS_4 to a folder with transformers 4.52 to 4.57")
    parts = tiny(parts.model.config.model_type, tie_word_embeddings=tied)
    folder, environment = tmp_path / "policy", os.environ | {"PYTHONPATH": packages}
    parts.save(folder)
    command = [sys.executable, "-c", OLDER, str(folder), photos[0], TEXT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "found.pt")
    ids = parts.tokenizer.apply_chat_template(
        [ASKED], add_generation_prompt=True, return_dict=False
    )
    prompt = PromptEncoder(parts)(tuple(ids), (photos[0],))
    assert torch.equal(found["ids"], prompt.input_ids)
    image = {
        "pixel_values": prompt.images[0].pixel_values,
        "image_grid_thw": prompt.images[0].grid_thw,
    }
    pads = (prompt.input_ids == parts.model.config.image_token_id)[None].int()
    ids = prompt.input_ids[None]
    with torch.no_grad():
        ours = parts.model(input_ids=ids, mm_token_type_ids=pads, **image).logits[0]
        said = parts.model.generate(
            input_ids=ids, mm_token_type_ids=pads, do_sample=False, max_new_tokens=12, **image
        )
    assert (found["logits"] - ours).abs().max() < 1e-5 and ours.std() > 0.1
    assert torch.equal(found["said"], said[0, ids.shape[1] :])


# what is refused


CODE = "open({!r}, 'w')\n"  # what a module of a folder would do


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_folder_is_never_run(one_folder, monkeypatch, file, known):
    """Nor does it ask on standard input whether it may."""
    ran = one_folder.with_name("ran")
    (one_folder / "own.py").write_text(CODE.format(str(ran)))
    (one_folder / "custom_generate").mkdir()
    (one_folder / "custom_generate" / "generate.py").write_text(CODE.format(str(ran)))
    classes = {
        "config.json": {"AutoConfig": "own.A", "AutoModelForImageTextToText": "own.B"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "own.A"]},
        "preprocessor_config.json": {"AutoImageProcessor": "own.A"},
    }
    set_field(one_folder, file, auto_map=classes[file])
    kinds = ("model_type", "tokenizer_class", "image_processor_type")
    if not known:
        set_field(one_folder, file, **{dict(zip(classes, kinds, strict=True))[file]: "own"})
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asks on standard input"))
    if known or file != "config.json":  # classes that are known read the rest of the folder
        assert_equal_weights(load(one_folder).model, tiny().model)
    else:
        match = rf"'{one_folder}' cannot be loaded: it needs code of its own \(auto_map\)"
        with pytest.raises(ValueError, match=match):
            load(one_folder)
    assert not ran.exists()


@pytest.mark.parametrize("config_too", [True, False])
def test_an_adapter_is_named(one_folder, config_too):
    (one_folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not config_too:
        (one_folder / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"model.path '{one_folder}' is a LoRA adapter: give"):
        load(one_folder)


def test_empty_path_is_refused():
    with pytest.raises(ValueError, match="model.path is empty"):
        load_policy(ModelConfig())


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"model.path '{tmp_path}/gone' .*: no such folder"):
        load(tmp_path / "gone")


@pytest.mark.parametrize(("kind", "config"), [("llama", LlamaConfig), ("qwen2", Qwen2Config)])
def test_other_architecture_is_named(tmp_path, kind, config):
    config(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    match = rf"model.path '{tmp_path}' is a '{kind}' model; supported: qwen2_5_vl, qwen2_vl"
    with pytest.raises(ValueError, match=match):
        load(tmp_path)
    with pytest.raises(ValueError, match=rf"architecture must be .* got '{kind}'"):
        build_tiny(TEXTS, architecture=kind)


TEXT_SIZES = {"hidden_size": 32, "num_hidden_layers": 1}
OTHERS = {
    "qwen3_vl_moe": Qwen3VLMoeConfig(text_config=TEXT_SIZES),
    "qwen3_5": Qwen3_5Config(text_config=TEXT_SIZES),
    "internvl": InternVLConfig(),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_relatives_that_are_no_family_are_refused_by_name(tmp_path, kind):
    OTHERS[kind].save_pretrained(tmp_path)
    match = (
        rf"^model.path '{tmp_path}' is a '{kind}' model; supported: "
        "qwen2_5_vl, qwen2_vl, qwen3_vl; docs/models.md tells how to add a family$"
    )
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("patch_size", 14, "patch_size is 14, vision_config's patch_size is 16"),
        ("merge_size", 4, "merge_size is 4, vision_config's spatial_merge_size is 2"),
        ("temporal_patch_size", 1, "size is 1, vision_config's temporal_patch_size is 2"),
    ],
)
def test_a_processor_of_other_cells_is_named(tmp_path, field, value, named):
    tiny("qwen3_vl").save(tmp_path)
    set_field(tmp_path, "preprocessor_config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"^model.path '{tmp_path}': the image .*{named}$"):
        load(tmp_path)


def test_pixel_limits_below_one_token_are_named(tmp_path):
    tiny("qwen3_vl").save(tmp_path)
    assert (
        load(tmp_path, min_pixels=1, max_pixels=1024).image_processor.size["longest_edge"] == 1024
    )
    match = "^model.max_pixels must be at least 1024, one token of 32 x 32 pixels, got 1023$"
    with pytest.raises(ValueError, match=match):
        load(tmp_path, min_pixels=1, max_pixels=1023)


def test_missing_mergers_of_deepstack_are_named(tmp_path):
    tiny("qwen3_vl").save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "deepstack_merger_list" not in name}
    assert len(weights) - len(kept) == 2 * 6
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    match = (
        rf"^model.path '{tmp_path}' lacks .* model\.visual\.deepstack_merger_list\.1\.norm\.weight$"
    )
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


def test_a_checkpoint_with_parts_for_video_loads(tmp_path):
    """As the published ones: a processor_config.json and a video_preprocessor_config.json."""
    parts = tiny("qwen3_vl")
    parts.save(tmp_path)
    image = json.loads((tmp_path / "preprocessor_config.json").read_text())
    video = image | {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2, "num_frames": None}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    both = {"processor_class": "Qwen3VLProcessor", "video_processor": video}
    (tmp_path / "processor_config.json").write_text(json.dumps(both | {"image_processor": image}))
    set_field(
        tmp_path, "preprocessor_config.json", image_processor_type="Qwen2VLImageProcessorFast"
    )
    loaded = load(tmp_path)
    assert_equal_weights(loaded.model, parts.model)
    assert loaded.image_processor.patch_size == 16
    assert set(loaded.image_processor.image_mean) == {0.5}


def test_weights_have_the_names_of_published_checkpoints(parts, folder):
    """In exports and in what servers get."""
    stored = load_file(folder / "model.safetensors").keys()
    heads = {name.partition("layers.")[0].partition("blocks.")[0] for name in stored}
    published = {"model.language_model.", "model.visual."}
    if parts.model.config.model_type == "qwen3_vl":
        assert {name for name in heads if name in published} == published
        assert all(name.startswith(("model.visual.", "model.language_model.")) for name in stored)
    sent = [
        name for name, _ in checkpoint_names(parts.model.config, parts.model.named_parameters())
    ]
    assert set(sent) == set(stored)


@pytest.mark.parametrize("parts", ["qwen2_5_vl", "qwen2_vl"], indirect=True)
def test_sliding_window_is_refused(parts, folder):
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text.pop("layer_types")
    text |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"'{folder}' uses sliding-window attention"):
        load(folder)
    text["max_window_layers"] = 2  # both layers are below it
    (folder / "config.json").write_text(json.dumps(config))
    assert_equal_weights(load(folder).model, parts.model)


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    weights[name] = weights[name][1:].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_the_file(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def drop_the_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("tokenizer*"), folder / "chat_template.jinja"):
        file.unlink()


def change_the_tokenizer(folder: Path) -> None:
    drop_the_tokenizer(folder)
    plain = json.loads(
        tiny().tokenizer.backend_tokenizer.to_str().replace("image_pad", "other_pad")
    )
    (folder / "tokenizer.json").write_text(json.dumps(plain))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (
            drop_a_weight,
            r"lacks the weights model\.language_model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (cut_a_weight, "cannot be loaded"),
        (cut_the_file, "cannot be loaded"),
        (drop_the_tokenizer, r"<\|image_pad\|> must be token 5 of the tokenizer, got None"),
        (change_the_tokenizer, r"<\|image_pad\|> must be token 5 of the tokenizer, got None"),
    ],
)
def test_damaged_folder_is_named(one_folder, damage, complaint):
    whole = one_folder.with_name("whole")
    shutil.copytree(one_folder, whole)
    damage(one_folder)
    with pytest.raises(ValueError, match=rf"model\.path '{one_folder}'.*{complaint}"):
        load(one_folder)
    assert_equal_weights(load(whole).model, tiny().model)


@pytest.mark.parametrize(
    ("limits", "got"),
    [
        ({"min_pixels": 0}, "0, 12544"),
        ({"min_pixels": -1}, "-1, 12544"),
        ({"max_pixels": 0}, "6272, 0"),
        ({"min_pixels": 12545}, "12545, 12544"),
        ({"min_pixels": 900, "max_pixels": 800}, "900, 800"),
    ],
)
def test_impossible_pixel_limits_are_named(one_folder, limits, got):
    match = f"model.min_pixels and model.max_pixels must be 0 < min <= max, got {got}"
    with pytest.raises(ValueError, match=match):
        load(one_folder, **limits)
