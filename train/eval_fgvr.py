"""Evaluation on fine-grained questions: answers of a model, their scores, and the papers' tables.

    python -m tercet.train.eval_fgvr --questions bird_seen.jsonl bird_unseen.jsonl \\
        --images PHOTOS --model.path CHECKPOINT --out eval/mine
    python -m tercet.train.eval_fgvr --questions bird_seen.jsonl bird_unseen.jsonl \\
        --rescore eval/mine/answers.jsonl --out eval/again

Every answer is a line of OUT/answers.jsonl as soon as it is there: a run that was stopped goes on
with the same command. `--rescore` scores such lines again, without photos and without a model.
docs/evaluation.md explains scores and tables.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import closing
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

from tercet.core.config import RunConfig
from tercet.core.rollout_config import RolloutConfig
from tercet.core.tool_config import EvalConfig
from tercet.train.cli.command_line import command, read_options
from tercet.train.cli.interrupt import Interrupted, StopSignal


def main() -> None:
    options = read_options(EvalConfig, None, __doc__.split("\n")[0])
    with StopSignal() as stop, stop.at_once():
        evaluate(options)


def evaluate(options: EvalConfig) -> None:
    """Ask the questions, or read answers to them; score them, write everything and print tables."""
    # Here, so that --help does not wait for torch and transformers.
    from tercet.train.evaluation.answer_file import read_answers
    from tercet.train.evaluation.questions import place_photos, read_all
    from tercet.train.evaluation.text_similarity import TextEncoder
    from tercet.train.learner.device import set_up

    check(options)
    if options.compare:
        return compare_two(options)
    questions = read_all(options.questions, options.per_class)
    if options.images:
        questions = replace(questions, all=place_photos(questions.all, options.images))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    device = set_up(RunConfig(device=options.device))
    encoder = None
    if options.text_encoder is not None and (options.rescore or "open" in options.modes):
        encoder = TextEncoder(options.text_encoder, device)
    places = questions.by_place
    leak_remarks = []
    if options.leaks:
        questions, leak_remarks = search_leaks(options, questions, out)
    if options.rescore:
        answers, remarks = read_answers(Path(options.rescore), places)
        kept = questions.by_place
        answers = [answer for answer in answers if (answer.file, answer.line) in kept]
    else:
        answers, remarks = generate(options, questions, places, out, device)
    report(options, questions, answers, [*leak_remarks, *remarks], encoder)


def check(options: EvalConfig) -> None:
    """Raises ValueError for options that do not go together, before anything is loaded."""
    if options.compare and len(options.compare) != 2:
        raise ValueError(f"--compare: give two folders of evaluations, got {options.compare}")
    if not options.questions and not options.compare:
        raise ValueError("--questions: give at least one file")
    if not options.modes or len(set(options.modes)) < len(options.modes):
        raise ValueError(f"--modes: closed, open or both, each once, got {options.modes}")
    if options.drop_leaks and not options.leaks:
        raise ValueError("--drop_leaks needs --leaks: the photos that were trained on")
    if options.trials > 1 and options.temperature == 0 and not options.rescore:
        raise ValueError(
            f"--trials {options.trials} needs --temperature above 0: greedy answers are all alike"
        )
    modes = {"stage2": ["open"], "choice": ["closed"], "both": ["closed"]}.get(options.prompt)
    if modes and options.modes != modes and not options.rescore:
        shows = "shows no options" if modes == ["open"] else "shows the options"
        raise ValueError(f"--prompt {options.prompt} {shows}: it needs --modes {modes[0]}")
    given = {"--model.path": options.model.path, "--chat.url": options.chat.url}
    given = [name for name, value in (given | {"--clip": options.clip}).items() if value]
    if len(given) > 1 and not options.rescore:
        raise ValueError(f"{' and '.join(given)} are given: name one model")
    if options.clip and options.modes != ["closed"]:
        raise ValueError("--clip chooses among the options: it needs --modes closed")
    if Path(options.out).exists() and not Path(options.out).is_dir():
        raise ValueError(f"--out: {options.out} is a file, where a folder is to be written")


def compare_two(options: EvalConfig) -> None:
    """Compare two evaluations: a table, and OUT/compare.csv."""
    from tercet.train.evaluation.compare import compare, print_differences, write_differences

    first, second = map(Path, options.compare)
    rows, notes = compare(first, second)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_differences(rows, out / "compare.csv")
    print_differences(rows, (str(first), str(second)), notes, console())
    print(f"written: {out / 'compare.csv'}")


def console():
    """For tables: as wide as the terminal, or wide enough for a file."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 130
    return Console(markup=False, highlight=False, width=width)


def search_leaks(options: EvalConfig, questions, out: Path):
    """Search for training photos; the questions that stay, and a remark."""
    from tercet.train.evaluation.leaks import find_leaks, training_photos, write_leaks
    from tercet.train.evaluation.progress import Steps

    trained = [key for path in options.leaks for key in training_photos(path)]
    total = len({*trained, *(q.image for q in questions.all if q.image)})
    with Steps("photos hashed", total) as steps:
        leaks = find_leaks(questions.all, trained, options.leak_distance, steps.advance)
    write_leaks(leaks, out / "leaks.csv")
    if options.drop_leaks:
        kept = [q for q in questions.all if (q.file, q.line) not in leaks.places]
        questions = replace(questions, all=kept)
    return questions, [leaks.remark(options.drop_leaks)]


def generate(
    options: EvalConfig, questions, places: dict, out: Path, device
) -> tuple[list, list[str]]:
    """Ask what OUT/answers.jsonl does not answer yet; all its answers, and remarks."""
    from tercet.train.evaluation.answer_file import AnswerFile
    from tercet.train.evaluation.asking import every_answer
    from tercet.train.evaluation.styles import Wording

    wording = Wording(options.prompt, options.demonstrations)
    asked_about, remarks = with_photos(options, questions.all)
    how = (options.modes, options.trials, options.options, options.seed)
    wanted = every_answer(asked_about, *how)
    with AnswerFile(out, settings_of(options), places) as file:
        given, kinds = {a.key for a in file.answers}, {asked.key for asked in wanted}
        left = [asked for asked in wanted if asked.key not in given]
        if left:
            try:
                if options.clip:
                    ask_clip(options, left, file, device)
                elif options.chat.url:
                    ask_endpoint(options, wording, left, file)
                else:
                    ask(options, wording, left, file, out, device)
            except (Interrupted, KeyboardInterrupt) as error:
                if isinstance(error, Interrupted):
                    error.saved = f"{len(file.answers):,} answers are in {file.path}; the same "
                    error.saved += "command goes on"
                raise
        answers = [a for a in file.answers if a.key in kinds]
        return answers, [*remarks, *file.remarks]


def with_photos(options: EvalConfig, questions: list) -> tuple[list, list[str]]:
    """The questions whose photo is there, with its key; and what tables say about the others.

    Raises:
        ValueError: a photo is missing and `missing` is "error", or all of them are.
    """
    from tercet.train.evaluation.progress import Steps
    from tercet.train.evaluation.questions import unusable

    with Steps("photos", len(questions)) as steps:
        bad = unusable(questions, steps.advance)
    usable = [q for q in questions if q.path not in bad]
    if not bad:
        return usable, []
    said = f"{len(questions) - len(usable)} of {len(questions)} questions have no usable photo"
    first = next(iter(bad.values()))
    if options.missing == "error" or not usable:
        raise ValueError(f"{said}: {first}; --missing wrong or --missing skip goes on without")
    print(f"{said}:", *list(bad.values())[:10], *["..."] * (len(bad) > 10), sep="\n  ")
    what = "counted as wrong" if options.missing == "wrong" else "left out"
    return usable, [f"{said}: {what}"]


def settings_of(options: EvalConfig) -> dict[str, object]:
    """What the answers depend on, beside the questions' files by their hashes."""
    model = {name: asdict(options.model)[name] for name in ("path", "dtype", "system_prompt")}
    pixels = [options.model.min_pixels, options.model.max_pixels]

    def content(path: str) -> str:
        return blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()

    files = {f"file {Path(path).name}": content(path) for path in options.questions}
    if options.demonstrations:
        files["demonstrations"] = content(options.demonstrations)
    return {
        **{f"model.{name}": value for name, value in model.items()},
        "model.min_pixels and max_pixels": pixels,
        **{
            name: getattr(options, name)
            for name in (
                *("prompt", "options", "per_class", "temperature", "seed", "max_tokens"),
                *("clip", "clip_templates"),
            )
        },
        "chat.model": options.chat.model if options.chat.url else None,
        **files,
    }


def ask_clip(options: EvalConfig, wanted: list, file, device) -> None:
    """Let a CLIP choose, and write every answer at once."""
    from tercet.train.evaluation.clip_baseline import Clip, templates_of
    from tercet.train.evaluation.progress import Steps

    clip = Clip(options.clip, device, templates_of(options.clip_templates))
    with Steps("answers", len(wanted)) as steps:
        for answer in clip.answers(wanted):
            file.write(answer)
            steps.advance()


def ask_endpoint(options: EvalConfig, wording, wanted: list, file) -> None:
    """Ask a chat endpoint, and write every answer at once."""
    from tercet.rollout.engine import Sampling
    from tercet.train.evaluation.chat_model import ChatAsker, open_endpoint

    sampling = Sampling(options.temperature, max_tokens=options.max_tokens)
    with closing(open_endpoint(options.chat, "chat")) as endpoint:
        more = (options.model.system_prompt, options.seed, options.chat.concurrency)
        asker = ChatAsker(endpoint, wording, sampling, *more)
        collect(asker.answers(wanted), len(wanted), file)


def collect(answers, total: int, file) -> None:
    """Write answers as they come, and show how fast that is."""
    from tercet.train.evaluation.progress import Steps

    async def write(steps: Steps) -> None:
        async for answer in answers:
            file.write(answer)
            steps.advance()

    with Steps("answers", total) as steps:
        asyncio.run(write(steps))


def ask(options: EvalConfig, wording, wanted: list, file, out: Path, device) -> None:
    """Ask a model, and write every answer at once."""
    from tercet.core.data.vision import PromptEncoder
    from tercet.core.models import load_policy
    from tercet.rollout.engine import Sampling
    from tercet.rollout.launch import open_engine
    from tercet.train.evaluation.asking import Asker

    parts = load_policy(options.model, device if options.rollout.engine == "local" else "cpu")
    sampling = Sampling(options.temperature, max_tokens=options.max_tokens)
    engine = open_engine(
        parts,
        PromptEncoder(parts),
        RolloutConfig(**asdict(options.rollout)),
        out / "sglang",
        lambda: iter(parts.model.named_parameters()),
    )
    asker = Asker(engine, parts, wording, sampling, options.model.system_prompt, options.seed)
    with closing(engine):
        collect(asker.answers(wanted), len(wanted), file)


def report(options: EvalConfig, questions, answers: list, remarks: list[str], encoder) -> None:
    """Score the answers, write the files and print the tables."""
    from tercet.train.evaluation.report import write_report
    from tercet.train.evaluation.scoring import add_similarity, score_all
    from tercet.train.evaluation.styles import STYLES
    from tercet.train.evaluation.text_similarity import Embeddings

    if not answers:
        raise ValueError(f"{options.rescore or options.out} holds no answer to these questions")
    out, remarks = Path(options.out), list(remarks)
    words, wrong = options.domain_words, options.missing == "wrong"
    style = STYLES[options.prompt]
    scored = score_all(answers, questions, words=words, missing_are_wrong=wrong, style=style)
    if encoder is not None:
        try:
            add_similarity(scored, words, Embeddings(encoder, out / "embeddings.sqlite"))
        except ValueError as error:
            if options.rescore:
                raise
            remarks.append(f"no similarity: {error}")  # the other scores must not be lost
    asked = {(s.answer.file, s.answer.line) for s in scored}
    files = {s.answer.file for s in scored}
    unanswered = sum(q.file in files and (q.file, q.line) not in asked for q in questions.all)
    if options.rescore and unanswered:
        remarks.append(f"{unanswered} of the questions have no answer: left out")
    write_report(
        scored, out, model=name_of(options), words=words, remarks=remarks, console=console()
    )
    if options.judge.url:
        judge(options, scored, out)
    print(f"written: {out}")


def name_of(options: EvalConfig) -> str:
    """The model's name in the tables."""
    chat = options.chat.model if options.chat.url else None
    path = options.clip or options.model.path or options.rescore
    return options.name or chat or Path(path).name


def judge(options: EvalConfig, scored: list, out: Path) -> None:
    """Let an endpoint judge the answers; what it says is kept in OUT/judge.sqlite."""
    from tercet.train.evaluation.chat_model import open_endpoint
    from tercet.train.evaluation.judging import judge_all, print_judged, write_judged
    from tercet.train.evaluation.progress import Steps

    asked = [s for s in scored if not s.missing]
    with closing(open_endpoint(options.judge, "judge", out / "judge.sqlite")) as endpoint:
        with Steps("judged", len(asked)) as steps:
            found = judge_all(endpoint, asked, options.judge.concurrency, steps.advance)
    write_judged(found, out)
    print_judged(found, options.judge.model, console())


if __name__ == "__main__":
    command(main)
