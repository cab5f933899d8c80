"""Every family's file offers what `core.models.Family` says."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from tercet.core.models import FAMILIES, IMAGE_TOKENS, Family

pytestmark = pytest.mark.core

FUNCTIONS = [name for name, _ in inspect.getmembers(Family, inspect.isfunction) if name[0] != "_"]


def test_the_families_are_those_with_a_file():
    assert FAMILIES == ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]
    assert len(FUNCTIONS) == 7 and len(Family.__annotations__) == 8


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_offers_every_name_with_one_signature(name):
    family = import_module(f"tercet.core.families.{name}")
    assert family.MODEL.config_class.model_type == name
    assert all(hasattr(family, attribute) for attribute in Family.__annotations__)
    for function in FUNCTIONS:
        wanted = inspect.signature(getattr(Family, function))
        without_self = wanted.replace(parameters=list(wanted.parameters.values())[1:])
        assert inspect.signature(getattr(family, function)) == without_self, function
    assert {"end_of_text", "turn_end", *IMAGE_TOKENS} <= family.SPECIAL_TOKENS.keys()
