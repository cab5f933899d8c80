"""Runs the arms of several seeds, one after the other or side by side; goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tercet.train.demo.arms import (
    ARMS,
    FORMS,
    START,
    TAPO,
    Equal,
    Job,
    folder_of,
    measured,
    run_arm,
)
from tercet.train.demo.pool import Task, run_tasks
from tercet.train.demo.progress import Progress
from tercet.train.demo.stages import PLAN, SHARED, Seed, prepare


def jobs_of(chosen: Sequence[str], seeds: Sequence[Seed]) -> list[Job]:
    """The jobs in their order: controls arm by arm, forms of the loss seed by seed.

    Args:
        chosen: controls, forms, or names of FORMS.
        seeds: each gets the same arms.

    Raises:
        ValueError: an arm that does not exist, or that is there twice, or none.
    """
    if list(chosen) == ["controls"]:
        arms: list[tuple[str, Equal]] = [(arm, "responses") for arm in (START, *ARMS)]
        arms += [(arm, "time") for arm in ARMS if arm != TAPO]
        return [Job(seed, arm, equal) for arm, equal in arms for seed in seeds]
    forms = list(FORMS) if list(chosen) == ["forms"] else list(chosen)
    if len(set(forms)) < len(forms) or not set(forms) <= set(FORMS) or not forms:
        known = ", ".join(map(repr, FORMS))
        raise ValueError(f"arms must be controls, forms, or different ones of {known}: {forms}")
    return [Job(seed, arm, "responses", True) for seed in seeds for arm in (START, *forms)]


def run_in_turn(seeds: Sequence[Seed], jobs: Sequence[Job], argv: Sequence[str]) -> None:
    """Prepare the seeds and run the jobs in this process."""
    plan = [(f"seed {seed.number}, {name}", PLAN[name]) for seed in seeds for name in SHARED]
    each = {START: PLAN["scores"]}
    plan += [(job.name, each.get(job.arm, sum(PLAN.values()) / 2)) for job in jobs]
    progress = Progress(plan)
    for seed in seeds:
        prepare(seed, argv, progress.begin)
    for job in jobs:
        progress.begin()
        run_arm(job, argv)


def run_side_by_side(
    seeds: Sequence[Seed],
    jobs: Sequence[Job],
    argv: Sequence[str],
    workers: int,
    minutes: float | None,
) -> None:
    """Prepare the seeds and run the jobs in processes, for at most so many minutes.

    Raises:
        ValueError: a process failed.
    """
    missing = {job.name: job for job in jobs if not job.kept()}
    tasks = []
    for seed in seeds:
        if any(job.seed == seed for job in missing.values()):
            log = seed.out.with_name(f"{seed.out.name}.log")
            tasks.append(Task(f"seed {seed.number}", partial(prepare, seed, argv), log))
    for job in missing.values():
        after = [f"seed {job.seed.number}"]
        if job.equal == "time":
            needed = [Job(job.seed, arm, "responses").name for arm in (TAPO, job.arm)]
            after += [name for name in needed if name in missing]
        log = job.seed.out / f"{folder_of(f'{job.arm} {job.equal}')}.log"
        tasks.append(Task(job.name, partial(measured, job, argv), log, tuple(after)))
    count = 0

    def done(task: Task, row) -> None:
        nonlocal count
        count += 1
        if task.name in missing:
            missing[task.name].keep(row)
        print(f"[{count}/{len(tasks)}] {task.name}", flush=True)

    late, failed = run_tasks(tasks, workers, done, minutes and 60 * minutes)
    if late:
        print(f"not done: {', '.join(late)}; the same command goes on")
    if failed:
        said = ", ".join(f"{task.name} ({task.log})" for task in failed)
        raise ValueError(f"failed, with the reason at the end of its log: {said}")
