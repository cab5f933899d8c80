"""What a teacher is asked: for descriptions, for concepts, for a chain of thought.

A prompt is data. PROMPT is Table 5 of the Fine-R1 paper to the letter, SYSTEM the system message of
all published records; the others are ours, as the papers do not print theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

PROMPT = (
    "This is a picture of a {label} with the following visual features: {concepts}. Based on the "
    "information provided, please answer the following question. Question: {question}. Note that "
    "you MUST first analyze the visual features that help you provide at most four candidate "
    "subcategories of the same super-category, then pay attention to the differences between "
    "candidate subcategories and make a detailed comparison between them to find evidence that "
    "help you make a prediction. The visual analysis process, candidate subcategories, comparison "
    "process, and final predicted subcategory are enclosed with `<analysis></analysis>`, "
    "`<options></options>`, `<comparison></comparison>`, and `<prediction></prediction>` tags, "
    "respectively, i.e., `<analysis>visual analysis process here</analysis><options>candidate "
    "subcategories here</options><comparison>comparison process here</comparison>"
    "<prediction>predicted subcategory here</prediction>`."
)
SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>"
    "<answer> answer here </answer>"
)
INSTRUCTIONS = (
    "Describe the {super_category} in the image in detail.",
    "Describe the shape, size and proportions of the {super_category} in the image.",
    "Describe the colors, patterns and markings of the {super_category} in the image.",
    "Describe the most distinctive parts of the {super_category} in the image.",
    "Describe what sets the {super_category} in the image apart from similar ones.",
)
"""Each asks for other attributes."""
OF_LABEL = (
    "List distinctive visual features of the {label} that help to recognize it in a picture. "
    "Answer with bullet points only, each a short phrase."
)
OF_PHOTO = (
    "These texts describe one picture of a {super_category}:\n\n{descriptions}\n\nList the visual "
    "features that they name. Answer with bullet points only, each a short phrase."
)


def cot_prompt(label: str, concepts: Sequence[str], question: str) -> str:
    """PROMPT with its three places filled."""
    return PROMPT.format(label=label, concepts=", ".join(concepts), question=question)
