"""Names in their normal form and in texts, against verdicts by hand."""

import random
import unicodedata

import pytest

from tercet.core.names import is_only_name, names_in, normal_form, refuse_alike

pytestmark = pytest.mark.core

BIRDS = ["auklet", "crested auklet", "Least_Auklet", "auk", "Ram C/V Van", "Boeing 737-300", "F-16"]


@pytest.mark.parametrize(
    "text, found",
    [
        ("a crested auklet", ["crested auklet"]),
        ("an AUKLET, a Crested_Auklet and an auk", ["auklet", "crested auklet", "auk"]),
        ("auk, auklet, auk", ["auk", "auklet"]),
        ("least\n auklet", ["Least_Auklet"]),
        ("auklets and hauk", []),
        ("(auk)", ["auk"]),
        ("a ram c / v van", ["Ram C/V Van"]),
        ("737-300 of Boeing", []),
        ("boeing 737-300ER", []),
        ("boeing 737-300.", ["Boeing 737-300"]),
        ("an F-16A", []),
        ("", []),
    ],
)
def test_names_in(text, found):
    assert names_in(text, BIRDS) == found


def test_names_in_prefers_the_longer_of_two_that_overlap():
    assert names_in("red blue green fish", ["red blue", "blue green fish"]) == ["blue green fish"]


def test_names_in_counts_alike_names_once_and_refuses_empty_ones():
    assert names_in("sand auk", ["sand_auk", "Sand Auk"]) == ["sand_auk"]
    with pytest.raises(ValueError, match="must not be empty, got '_ '"):
        names_in("auk", ["auk", "_ "])


def test_is_only_name():
    assert is_only_name("It is an AUK.", "auk", BIRDS)
    assert is_only_name("auk or auk", "auk", BIRDS)
    assert is_only_name("least auklet", "least auklet", BIRDS)
    assert not is_only_name("auk or auklet", "auk", BIRDS)
    assert not is_only_name("auklet", "auk", BIRDS)
    assert not is_only_name("", "auk", BIRDS)
    with pytest.raises(ValueError, match="'gull' is not a known name"):
        is_only_name("gull", "gull", BIRDS)


def nfd(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    "name, spellings",
    [
        ("Citroën C4", [nfd("Citroën C4"), "CITROËN_C4", "Citro\u200bën\u00a0C4", " citroën  c4"]),
        ("Brewer's Blackbird", ["Brewer’s Blackbird", "Brewer‘s blackbird", "BREWERʼS BLACKBIRD",
                                "Brewer`s Blackbird", "Brewer´s Blackbird", "Brewer＇s Blackbird"]),
        ("Boeing 737-200", ["Boeing 737\u2011200", "Boeing 737–200", "Boeing 737—200",
                            "Boeing 737−200", "Ｂｏｅｉｎｇ ７３７－２００",
                            "Boeing\u202f737\u00ad-200"]),
        ("the \"Auk\"", ["the “Auk”", "the „auk‟", "the «Auk»", "the ＂Auk＂"]),
        ("Weißstorch", ["WEISSSTORCH", "weissstorch"]),
        ("Ram C/V Van", ["Ram C / V_Van", "ram c／v van", "Ram® C/V Van".replace("®", "™")]),
        ("ﬁnch", ["finch", "FINCH"]),
        ("小海雀", ["小\ufe00海雀", "小海\u200d雀"]),
        ("カラス", ["ｶﾗｽ"]),
        ("ガ", ["カ\u3099", "ｶﾞ"]),
        ("까치", [nfd("까치")]),
    ],
)  # fmt: skip
def test_spellings_of_one_name(name, spellings):
    for spelling in spellings:
        assert normal_form(spelling) == normal_form(name)
        assert names_in(f"It is the {spelling}.", [name]) == [name]
        assert names_in(f"It is the {name}.", [spelling]) == [spelling]


def test_names_that_stay_apart():
    names = [
        "737-200",
        "737 200",
        "737200",
        "Citroen",
        "Citroën",
        "S4",
        "S 4",
        "鷗",
        "鸥",
        "auk",
        "auks",
    ]
    assert len({normal_form(name) for name in names}) == len(names)


def test_the_normal_form_of_a_normal_form_is_itself():
    draw = random.Random(0)
    letters = [*"aZß İıſ_'`´’ʼ-–−\u2011\u00ad\u200b\u00a0 <>/ﬁŉ½™Å\u030a\u0316\u0345ͅᾳΣς가각",
               *"\u1100\u1161\u11a8ｶﾞ小\ufe0f\u3164\U00010400\ud800\x00"]  # fmt: skip
    for _ in range(5_000):
        text = "".join(draw.choices(letters, k=draw.randrange(9)))
        assert normal_form(normal_form(text)) == normal_form(text), ascii(text)
        assert normal_form(nfd(text)) == normal_form(text), ascii(text)


@pytest.mark.parametrize(
    "text, names, found",
    [
        ("这是小海雀。", ["小海雀", "凤头海雀"], ["小海雀"]),
        ("这是凤头海雀吗", ["海雀", "凤头海雀"], ["凤头海雀"]),
        ("これはウミスズメです", ["ウミスズメ"], ["ウミスズメ"]),
        ("ก็นกกระจอกครับ", ["นกกระจอก"], ["นกกระจอก"]),
        ("หมี", ["หม"], []),  # its last letter carries a vowel sign in the text
        ("이것은 까치입니다", ["까치"], ["까치"]),
        ("这是Boeing 737型", ["Boeing 737"], ["Boeing 737"]),
        ("型号7370", ["737"], []),
        ("это синица.", ["синица"], ["синица"]),
        ("синицами", ["синица"], []),
        ("यह बिल्ली है", ["बिल्ली", "बिल"], ["बिल्ली"]),
        ("बिल्ली", ["बिल"], []),
        ("auk\u0301let", ["auk"], []),
    ],
)
def test_words_end_as_in_their_script(text, names, found):
    assert names_in(text, names) == found


def test_two_spellings_of_a_class_are_refused():
    refuse_alike([("bird", "auk"), ("bird", "auk"), ("bird", "auklet"), ("fish", "auk")], "photos")
    refuse_alike([], "photos")
    with pytest.raises(ValueError) as caught:
        refuse_alike([("bird", "least auklet"), ("bird", "auk"), ("bird", "Least Auklet")], "x")
    assert str(caught.value) == (
        "x: the sub-categories of 'bird' 'Least Auklet' and 'least auklet' are one name in two "
        "spellings: rename or merge them"
    )
    with pytest.raises(ValueError, match="super-categories 'Bird' and 'bird' are one name"):
        refuse_alike([("bird", "auk"), ("Bird", "gull")], "photos")
    with pytest.raises(ValueError) as caught:
        refuse_alike([("", "ë"), ("", nfd("ë"))], "rows")
    assert "('e\\u0308') and" in str(caught.value) and "('\\xeb')" in str(caught.value)
