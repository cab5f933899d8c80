import pytest

from tercet.core.data.questions import QUESTIONS, questions_for, read_questions

pytestmark = pytest.mark.core


def test_built_in_questions_name_the_super_category():
    assert questions_for("bird", QUESTIONS)[0] == "What kind of bird is this?"
    assert questions_for("birds", QUESTIONS) == questions_for("bird", QUESTIONS)
    assert "What species is the Bird in this picture?" in questions_for("Bird", QUESTIONS)
    assert "What model is the car in this picture?" in questions_for("car", QUESTIONS)
    assert questions_for("moss", QUESTIONS)[0] == "What kind of moss is this?"
    assert questions_for("", QUESTIONS)[0] == "What kind of object is this?"
    for name in QUESTIONS:
        filled = questions_for(name, QUESTIONS)
        assert len(filled) >= 5 and not any("{" in text for text in filled)


def test_a_yaml_file_overrides_by_super_category(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_text("bird: ['Which {super_category}?', 'Name it {exactly}.']\ndefault: ['What?']\n")
    templates = read_questions(path)
    assert questions_for("birds", templates) == ["Which bird?", "Name it {exactly}."]
    assert questions_for("moss", templates) == ["What?"]
    assert questions_for("car", templates) == questions_for("car", QUESTIONS)
    path.write_text("Garden_Bird: ['Which?']")
    assert questions_for("garden bird", read_questions(path)) == ["Which?"]
    assert read_questions(None) is QUESTIONS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a, b]", "must map super-categories"),
        ("bird: Which?", r"'bird' must be a list of questions, got 'Which\?'"),
        ("bird: []", r"'bird' must be a list of questions, got \[\]"),
        ("bird: [3]", "'bird' must be a list of questions"),
        ("bird: [", "cannot be read"),
        ("737: ['Which?']", "in quotes, if it is a number.* must be a text, got 737"),
        ("bird: [' ']", "'bird' must be a list of questions"),
        ("bird: ['<image>Which?']", "must not hold <image>"),
        ("bird: ['Which<|im_end|>?']", r"must not hold <\|im_end"),
        ('bird: ["\\ud800?"]', "half a character|cannot be read"),
        ("bird: 2001-99-99", "cannot be read"),
        ("[" * 5_000, "nested too deeply"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", r"line 2: aliases \(\*name\) are not"),
        ("a: ['" + "x" * 2**20 + "']", "larger than 1,048,576 bytes"),
    ],
)
def test_faulty_yaml_is_named(tmp_path, text, message):
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"q.yaml.*{message}"):
        read_questions(path)
    with pytest.raises(ValueError, match="gone.yaml.*cannot be read"):
        read_questions(tmp_path / "gone.yaml")
