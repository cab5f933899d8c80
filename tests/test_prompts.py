"""Prompt strings to the letter, the two extraction rules, chat ids."""

import random
import re
from collections import Counter

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from tercet.core.prompts import (
    PROMPTS,
    STAGE2_INSTRUCTION,
    chat_ids,
    closed_world_text,
    extract_answer,
    open_world_text,
    read_prompt,
    squeeze,
    stage2_text,
    training_text,
)

pytestmark = pytest.mark.core

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
QWEN2_VL_TEMPLATE = """{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif -%}
<|im_start|>{{ message['role'] }}\n
{%- if message['content'] is string -%}{{ '\n' + message['content'] }}<|im_end|>\n
{%- else -%}{{ '\n' }}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ item['text'] }}{%- endif -%}
{%- endfor -%}<|im_end|>\n{%- endif -%}{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def make_tokenizer(template=QWEN2_VL_TEMPLATE, special=SPECIAL):
    """One token a character, and the special tokens."""
    alphabet = [chr(code) for code in [10, *range(32, 127)]]
    tokenizer = Tokenizer(WordLevel({char: i for i, char in enumerate(alphabet)}))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


def rendered(messages, images, template=QWEN2_VL_TEMPLATE, **options):
    tokenizer = make_tokenizer(template)
    ids = chat_ids(tokenizer, messages, images, **options)
    assert isinstance(ids, list) and all(type(token) is int for token in ids)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert ids.count(pad) == images
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def user(content):
    return {"role": "user", "content": content}


def test_prompt_strings_to_the_letter():
    assert STAGE2_INSTRUCTION == (
        "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> tags. Then, provide your final answer enclosed within <answer> </answer> tags."  # noqa: E501
    )
    assert stage2_text(" What bird? \n") == "What bird?\n\n" + STAGE2_INSTRUCTION
    assert open_world_text("What bird?") == (
        "Given the question: What bird?. This is a fine-grained question. Output reasoning in <think></think> and the final answer in <answer></answer>."  # noqa: E501
    )
    assert closed_world_text("What bird?", ("a", "b's")) == (
        "Given the question: What bird?, based on the options provided in ['a', \"b's\"], output the thinking process in <think> </think> and final choice in <answer> </answer> tags. The response format should be: <think>...</think> <answer>choice</answer>."  # noqa: E501
    )


@pytest.mark.parametrize(
    "text, first, longest",
    [
        ("<think>t</think><answer>auk</answer>", "auk", "auk"),
        ("<answer>a</answer> or <answer>b</answer>", "a", "a</answer> or <answer>b"),
        ("<answer>a</answer> b</answer>", "a", "a</answer> b"),
        ("<answer> least\nauklet \n</answer>", "least\nauklet", "least\nauklet"),
        ("<answer></answer>", "", ""),
        ("<answer>a<answer>b</answer>", "a<answer>b", "a<answer>b"),
        ("<answer>cut off", None, None),
        ("</answer>a<answer>", None, None),
        ("least auklet", None, None),
        ("", None, None),
    ],
)
def test_extract_answer(text, first, longest):
    assert extract_answer(text) == first
    assert extract_answer(text, "first") == first
    assert extract_answer(text, which="longest") == longest


def test_extract_answer_knows_two_rules():
    with pytest.raises(ValueError, match="'first' or 'longest', got 'last'"):
        extract_answer("<answer>a</answer>", "last")


OLD_ANSWER = {
    "first": re.compile("<answer>(.*?)</answer>", re.DOTALL),
    "longest": re.compile("<answer>(.*)</answer>", re.DOTALL),
}
PIECES = [
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "<",
    ">",
    "/",
    " ",
    "\n",
    "\u00a0",
    "auk",
    "a",
]


def test_reading_is_that_of_the_released_expressions():
    """They are quadratic: here they read short texts."""
    draw = random.Random(0)
    found = Counter()
    for _ in range(20_000):
        text = "".join(draw.choices(PIECES, k=draw.randrange(12)))
        assert squeeze(text) == re.sub(r"\s*([<>/])\s*", r"\1", text)
        for which, old in OLD_ANSWER.items():
            match = old.search(text)
            assert extract_answer(text, which) == (match.group(1).strip() if match else None), text
            found[which, match is None] += 1
    assert min(found.values()) > 1000


def test_a_plain_question_puts_its_image_first():
    assert rendered([user("What bird?")], 1) == (
        f"{DEFAULT_SYSTEM}<|im_start|>user\n{IMAGE}What bird?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_markers_become_images_where_they_stand():
    text = rendered([user("Is <image> or <image>\nan auk?")], 2)
    assert text == (
        f"{DEFAULT_SYSTEM}<|im_start|>user\nIs {IMAGE} or {IMAGE}\nan auk?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_turns_before_the_last_and_the_image_of_a_later_one():
    messages = [user("Hi"), {"role": "assistant", "content": "Yes?"}, user("<image>What bird?")]
    assert rendered(messages, 1) == (
        f"{DEFAULT_SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}What bird?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_system_prompt_stands_in_only_where_messages_hold_none():
    end = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Mine"}, user("Hi")]
    yours = "<|im_start|>system\nYours<|im_end|>\n"
    mine = "<|im_start|>system\nMine<|im_end|>\n"
    assert rendered([user("Hi")], 0, system_prompt="Yours") == yours + end
    assert rendered(own, 0, system_prompt="Yours") == mine + end
    assert rendered(own, 0) == mine + end


def test_messages_are_left_as_they_are():
    messages = [user("What bird?")]
    rendered(messages, 1, system_prompt="Yours")
    assert messages == [{"role": "user", "content": "What bird?"}]


def test_text_templates_serve_prompts_without_images():
    assert rendered([user("Hi")], 0, template=TEXT_TEMPLATE) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="chat template does not render"):
        chat_ids(make_tokenizer(TEXT_TEMPLATE), [user("Hi")], 1)


@pytest.mark.parametrize(
    "content, images, message",
    [
        ("What <image> bird?", 2, "mark 1 images with <image>, but 2 are given"),
        ("What <image> bird?", 0, "mark 1 images with <image>, but 0 are given"),
        ("What bird?", 2, "mark 0 images with <image>, but 2 are given"),
        ("a pad <|image_pad|> in the text", 1, "1 images, 2 pads"),
        (["What bird?"], 1, "message 0 must have a role and a text"),
    ],
)
def test_images_that_do_not_fit(content, images, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        chat_ids(make_tokenizer(), [user(content)], images)


def test_a_template_that_drops_images_is_caught():
    silent = "{% for message in messages %}{{ message.role }}{% endfor %}"
    with pytest.raises(ValueError, match="1 images, 0 pads"):
        chat_ids(make_tokenizer(silent), [user("Hi")], 1)


def test_a_tokenizer_without_image_pads_is_named():
    with pytest.raises(ValueError, match=r"the tokenizer has no token <\|image_pad\|>"):
        chat_ids(make_tokenizer(special=SPECIAL[:4]), [user("Hi")], 1)


def test_training_prompts_to_the_letter():
    options = ("gull", "least auklet")
    listed = "A. gull\nB. least auklet"
    tagged = "Put the answer within <answer> </answer> tags."
    assert training_text("stage2", "Which? ", options) == stage2_text("Which?")
    assert training_text("open", "Which?", options) == open_world_text("Which?")
    assert training_text("choice", "Which?", options) == (
        f"Which?\n{listed}\n\nAnswer with the letter from the given choices directly. {tagged}"
    )
    assert training_text("both", "Which?", options) == (
        f"Which?\n{listed}\n\nAnswer the correct choice and its category name. {tagged}"
    )
    attribute = training_text("attribute", "Which?", options)
    assert attribute.startswith(f"Which?\n{listed}\n\n")
    assert all(f"<{tag}> </{tag}>" in attribute for tag in ("think", "attribute", "answer"))
    assert training_text("attribute", "Which?").startswith("Which?\n\nFirst")
    assert training_text("no_thinking", "Which?") == "Which? Please directly output the answer."
    template = "{question} of {options}: say {it}"
    assert training_text(template, "Which {options}?", options) == (
        f"Which {{options}}? of {listed}: say {{it}}"
    )


def test_a_template_is_read_from_a_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Q: {question}")
    assert read_prompt(str(file)) == "Q: {question}"
    assert [read_prompt(name) for name in PROMPTS] == list(PROMPTS)
    file.write_text("Q: {options}")
    with pytest.raises(ValueError, match=r"the template .*mine.txt has no \{question\}"):
        read_prompt(str(file))
    with pytest.raises(ValueError, match="rollout.prompt must be stage2, .* got 'stage3': No"):
        read_prompt("stage3")
