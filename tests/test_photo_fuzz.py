"""A sample of tests/photo_fuzz.py: the check at the start and the real read agree."""

import pytest
from photo_fuzz import count

pytestmark = pytest.mark.core


def test_what_the_check_accepts_loads_with_the_size_that_was_foretold(tmp_path):
    found = count(range(600), tmp_path)
    assert set(found) == {"accepted", "refused"} and min(found.values()) > 150
