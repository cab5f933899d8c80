"""The answers of a run, a JSON line each: written at once, read back, never asked for twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from tercet.core.data.fields import choice_of, json_lines, load_json
from tercet.core.data.files import shown
from tercet.core.types import EvalQuestion

ANSWERS, SETTINGS = "answers.jsonl", "run.json"

Mode = Literal["closed", "open"]
Place = tuple[str, int]
"""File and line of a question."""
Key = tuple[str, int, Mode, int, tuple[int, ...]]
"""File, line, mode, trial and order of the options: an answer is given once for each."""


@dataclass(frozen=True)
class Answer:
    """What a model said, e.g. `Answer("bird_seen", 1, "open", 0, "<answer>wren</answer>")`."""

    file: str
    """Name of the question file without its ending."""
    line: int
    """From 1."""
    mode: Mode
    trial: int
    """From 0."""
    output: str
    image: str = ""
    """Path of the photo as the question gives it."""
    finish: str = ""
    """Why it ended: stop, or length where it was cut off."""
    order: tuple[int, ...] = ()
    """Which option of the question stood at each place of the prompt; empty: as in its file."""

    @property
    def key(self) -> Key:
        return self.file, self.line, self.mode, self.trial, self.order


def read_answers(
    path: Path, questions: Mapping[Place, EvalQuestion]
) -> tuple[list[Answer], list[str]]:
    """Read a file of answers to the given questions.

    Args:
        path: JSON Lines of {"file", "line", "mode", "trial", "output"} and by choice "image".
        questions: by file and line.

    Returns:
        The answers, and remarks: a last line that breaks off and repeated lines are left out.

    Raises:
        ValueError: naming the line at fault: it is no answer, none to a question that is given, or
            a second, different answer to one.
    """
    found: dict[tuple, tuple[Answer, str]] = {}
    remarks, repeated = [], 0

    def half_line(where: str) -> None:
        remarks.append(f"{where} breaks off and is left out")

    for where, record in json_lines(path, half_line):
        answer = _answer(record, where, questions)
        earlier, place = found.setdefault(answer.key, (answer, where))
        repeated += place != where
        if earlier.output != answer.output:
            raise ValueError(f"{where}: another answer to the question of {place}")
    if repeated:
        remarks.append(f"{path}: {repeated} repeated lines are left out")
    return [answer for answer, _ in found.values()], remarks


def _answer(record: dict, where: str, questions: Mapping[Place, EvalQuestion]) -> Answer:
    mode = choice_of(record, "mode", get_args(Mode), where)
    file, line, output = (record.get(name) for name in ("file", "line", "output"))
    trial, image = record.get("trial", 0), record.get("image", "")
    for name, value in (("line", line), ("trial", trial)):
        if type(value) is not int:
            raise ValueError(f"{where}: {name!r} must be a whole number, got {shown(value)}")
    if not isinstance(output, str):
        raise ValueError(f"{where}: 'output' must be a text, got {shown(output)}")
    question = questions.get((file, line)) if isinstance(file, str) else None
    if question is None:
        files = ", ".join(sorted({name for name, _ in questions}))
        raise ValueError(
            f"{where}: an answer to line {line} of {shown(file)}, which is no question of: {files}"
        )
    if image and image != question.path:
        raise ValueError(
            f"{where}: an answer about {shown(image)}, but line {line} of {file} is about "
            f"{question.path!r}"
        )
    output = output.encode(errors="replace").decode()  # half characters cannot be written
    finish = record.get("finish", "")
    return Answer(
        file,
        line,
        mode,
        trial,
        output,
        question.path,
        finish if isinstance(finish, str) else "",
        _order(record.get("order", []), question, where),
    )


def _order(order: object, question: EvalQuestion, where: str) -> tuple[int, ...]:
    places = list(range(len(question.options)))
    whole = isinstance(order, list) and all(type(place) is int for place in order)
    if not whole or order and sorted(order) != places:
        raise ValueError(f"{where}: 'order' must hold each of {places} once, got {shown(order)}")
    return tuple(order)


class AnswerFile:
    """The file that a run's answers are appended to; a context manager that holds it alone.

    Args:
        folder: made where there is none.
        settings: what the answers depend on; they must be those that the folder's answers were
            given with, as far as both name the same.
        questions: by file and line.

    Raises:
        ValueError: the folder holds answers of other settings or questions, or another process
            writes into it.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, object], questions: Mapping[Place, EvalQuestion]
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ANSWERS
        self._file = open(self.path, "ab")  # closed in __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--out: {folder} is in use by another process") from error
        _same_settings(folder / SETTINGS, settings)
        self._cut_half_line()
        self.answers, self.remarks = read_answers(self.path, questions)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, answer: Answer) -> None:
        """Append an answer; it is with the operating system when this returns."""
        line = json.dumps(asdict(answer), ensure_ascii=False) + "\n"
        self._file.write(line.encode(errors="replace"))
        self._file.flush()
        self.answers.append(answer)

    def _cut_half_line(self) -> None:
        """Cut off what a killed run left of its last line."""
        content = self.path.read_bytes()
        os.truncate(self.path, content.rfind(b"\n") + 1)


def _same_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Write the settings, or check them against those written before."""
    now = json.loads(json.dumps(settings))
    then = load_json(path) if path.exists() else {}
    if not isinstance(then, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(then)}")
    for name in then.keys() & now.keys():
        if then[name] != now[name]:
            raise ValueError(
                f"--out: the answers in {path.parent} were given with {name} {shown(then[name])}, "
                f"now it is {shown(now[name])}: give another --out"
            )
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(then | now, indent=1), encoding="utf-8")
    os.replace(unfinished, path)
