"""What a policy's hidden states hold: a linear probe, genera of species, right and wrong names.

    python -m tercet.train.analyse --photos PHOTOS --model.path CHECKPOINT --other BASE

The three analyses of the Fine-R1 paper's section 5.4, on any folder of photos. `--other` is a model
to compare with, for instance the one that training began with.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from tercet.core.config import RunConfig
from tercet.core.tool_config import AnalyseConfig
from tercet.train.cli.command_line import command, read_options
from tercet.train.cli.interrupt import StopSignal

ASKED = "Is the {kind} species {name}?"
"""The paper's question, with the photo before it."""


def main() -> None:
    options = read_options(AnalyseConfig, None, __doc__.split("\n")[0])
    with StopSignal() as stop, stop.at_once():
        analyse(options)


def analyse(options: AnalyseConfig) -> None:
    """Run all analyses on one or two models, write files and print a line for each figure."""
    # Here, so that --help does not wait for torch and transformers.
    from tercet.core.data.photos import read_photos
    from tercet.core.models import load_policy
    from tercet.train.evaluation.hidden_states import HiddenStates
    from tercet.train.learner.device import set_up

    photo_set = read_photos(options.photos, "error", options.names)
    train, test = halves(photo_set, options.seed)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    device = set_up(RunConfig(device=options.device))
    paths = [path for path in (options.model.path, options.other) if path]
    differences = {}
    for path in paths:
        states = HiddenStates(load_policy(replace(options.model, path=path), device))
        probe(states, path, train, test, options.seed)
        differences[path] = genus(states, path, photo_set.photos, options)
        plane(states, path, test, options, out / f"plane_{len(differences)}.png")
    write_differences(differences, out / "genus.csv")
    compare(differences)
    print(f"written: {out}")


def halves(photo_set, seed: int) -> tuple[list, list]:
    """Photos for training a probe and for testing it: the folder's splits, else seeded halves."""
    from tercet.core.draws import seeded_order

    if photo_set.splits is not None:
        train = [p for p in photo_set.photos if photo_set.splits[p.image] != "test"]
        return train, [p for p in photo_set.photos if photo_set.splits[p.image] == "test"]
    classes = defaultdict(dict)
    for photo in photo_set.photos:
        classes[photo.super_category, photo.sub_category][photo.image] = photo
    train, test = [], []
    for photos in classes.values():
        order = [photos[key] for key in seeded_order(photos, seed, "probe")]
        train, test = [*train, *order[::2]], [*test, *order[1::2]]
    return train, test


def probe(states, path: str, train: list, test: list, seed: int) -> None:
    """The linear probe on the mean image token."""
    import torch

    from tercet.train.evaluation.analysis import linear_probe
    from tercet.train.evaluation.progress import Steps

    names = sorted({(p.super_category, p.sub_category) for p in train})
    test = [p for p in test if (p.super_category, p.sub_category) in names]
    if not test:
        raise ValueError("no test photo is of a sub-category that has training photos")
    with Steps("photos", len(train) + len(test)) as steps:
        rows = []
        for photo in (*train, *test):
            rows.append(states.photo(photo.image))
            steps.advance()
    features = torch.stack(rows)
    labels = [names.index((p.super_category, p.sub_category)) for p in (*train, *test)]
    labels, n = torch.tensor(labels), len(train)
    found = linear_probe(features[:n], labels[:n], features[n:], labels[n:], seed)
    print(
        f"{path}: linear probe {found.best:.2f} % (best epoch on test photos, as in the "
        f"paper), {found.last:.2f} % after the last; {n} + {len(test)} photos, {len(names)} classes"
    )


def genus(states, path: str, photos: list, options: AnalyseConfig) -> dict[str, float]:
    """Differences of the names' embeddings by genus; none where no two names share one."""
    from tercet.train.evaluation.analysis import genera_of, genus_differences

    names = sorted({photo.sub_category for photo in photos})
    genera = genera_of(names, options.genera)
    found = genus_differences({n: states.name(n) for n in genera}, genera, options.seed)
    if found:
        mean = sum(found.values()) / len(found)
        print(f"{path}: same genus minus other genera {mean:+.4f}, mean of {len(found)} species")
    return found


def write_differences(differences: dict[str, dict[str, float]], path: Path) -> None:
    """A row for each species, a column for each model."""
    names = list(dict.fromkeys(name for of in differences.values() for name in of))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["species", *differences])
        for name in names:
            writer.writerow([name, *(of.get(name, "") for of in differences.values())])


def compare(differences: dict[str, dict[str, float]]) -> None:
    """The paired t-test of the first model against the other."""
    from tercet.train.evaluation.analysis import compare_differences

    if len(differences) == 2 and min(map(len, differences.values())) >= 2:
        mine, other = differences
        t, p = compare_differences(differences[other], differences[mine])
        print(f"{mine} against {other}: paired t = {t:.3f}, p = {p:.3g}")


def plane(states, path: str, test: list, options: AnalyseConfig, file: Path) -> None:
    """The question with the right and with a wrong name, in the plane of the largest variance."""
    import torch

    from tercet.core.draws import seeded_int, seeded_order
    from tercet.train.evaluation.analysis import draw_plane, principal_components

    names = defaultdict(set)
    for photo in test:
        names[photo.super_category].add(photo.sub_category)
    chosen = {photo.image: photo for photo in test if len(names[photo.super_category]) > 1}
    rows, right = [], []
    for key in seeded_order(chosen, options.seed, "plane")[: options.most_photos]:
        kind, true = chosen[key].super_category, chosen[key].sub_category
        others = sorted(names[kind] - {true})
        wrong = others[seeded_int(options.seed, "wrong", key) % len(others)]
        for name in (true, wrong):
            rows.append(states.question(ASKED.format(kind=kind, name=name), key))
            right.append(name == true)
    if rows:
        points, shares = principal_components(torch.stack(rows))
        draw_plane(points, right, shares, path, file)


if __name__ == "__main__":
    command(main)
