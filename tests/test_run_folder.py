"""Which run a folder belongs to, who may write into it, and where a run goes on."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from test_checkpoint import save_model, without_weights

from tercet.core.config import SftConfig, TapoConfig
from tercet.train.run import run_folder
from tercet.train.run.checkpoint import Checkpoints, identity_of
from tercet.train.run.complete import COMPLETE, complete_in, read_complete, seal, unseal
from tercet.train.run.identity import Kind, kind_of, options_of
from tercet.train.run.run_folder import RunFolder, open_folder, read_identity

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:checkpoint")]


@pytest.fixture
def config(tmp_path, monkeypatch) -> TapoConfig:
    """Of a run in tmp_path/run, from a model that is a configuration alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").mkdir()
    save_model(tmp_path / "policy")
    config = TapoConfig()
    config.model.path, config.run.out, config.run.device = "policy", "run", "cpu"
    return config


def begin(config, *steps: int, changed: dict | None = None) -> RunFolder:
    """A run that begins, is saved after these steps and ends; `changed`: its options then."""
    with open_folder(config, None) as folder:
        options = folder.identity.options | (changed or {})
        folder.identity = replace(folder.identity, options=options)
        folder.note_data({"source": "s", "triplets": "t", "photo_contents": "p"})
        folder.write()
        checkpoints = Checkpoints(without_weights(), config.run, folder)
        for step in steps:
            folder.checkpoint = checkpoints.save(step, {"groups": [], "stream": {}})
    return folder


def go_on(config, resume: str = "auto") -> RunFolder:
    with open_folder(config, resume) as folder:
        return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in files}


def test_a_run_out_that_cannot_be_made_is_named(config):
    Path("run").write_text("a file")
    with pytest.raises(ValueError, match="run.out run cannot be made: File exists"):
        open_folder(config, None)
    config.run.out = "run/below"
    with pytest.raises(ValueError, match="run.out run/below cannot be made: Not a directory"):
        open_folder(config, None)
    assert Path("run").read_text() == "a file"


@pytest.mark.parametrize("left", ["metrics.jsonl", "identity.json", "checkpoints/step_000001"])
def test_a_folder_that_holds_a_run_is_refused_untouched(config, left):
    path = Path("run") / left
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if "step" in left else path.write_text("")
    (Path("run") / "config.yaml").write_text("old")
    before = contents(Path("run"))
    with pytest.raises(
        ValueError, match=r"run.out run holds a run already .*--resume auto"
    ) as said:
        open_folder(config, None)
    assert left.partition("/")[0] in str(said.value) and "\n" not in str(said.value)
    assert contents(Path("run")) == before


def test_a_folder_with_other_things_is_no_run(config):
    (Path("run") / "checkpoints").mkdir(parents=True)
    (Path("run") / "triplets.json").write_text("{}")
    assert begin(config).checkpoint is None


def test_overwrite_moves_the_old_run_aside(config):
    first = begin(config, 3)
    old = contents(Path("run"))
    config.run.overwrite = True
    for number in (1, 2):
        folder = begin(config, 1)
        assert folder.lines == [
            f"the run that was in run is now in {Path('run').resolve()}.{number}"
        ]
        assert folder.identity.id != first.identity.id
        assert go_on_without_overwrite(config).checkpoint == Path("run/checkpoints/step_000001")
    moved = {name.replace("run.1/", "run/"): data for name, data in contents(Path("run.1")).items()}
    assert moved == old
    config.run.out = "fresh"
    assert begin(config).lines == []


def go_on_without_overwrite(config) -> RunFolder:
    config.run.overwrite = False
    folder = go_on(config)
    config.run.overwrite = True
    return folder


def test_overwrite_never_moves_what_the_new_run_needs(config):
    folder = begin(config, 3)
    config.run.overwrite, config.model.path = True, str(folder.checkpoint)
    with pytest.raises(ValueError, match="model.path run/.*step_000003 lies in run.out run, which"):
        open_folder(config, None)
    assert Path("run/checkpoints/step_000003").is_dir() and not Path("run.1").exists()


@pytest.mark.parametrize("resume", ["", " "])
def test_an_empty_resume_is_an_error(config, resume):
    with pytest.raises(ValueError, match="--resume is empty: give auto, or the folder of a check"):
        open_folder(config, resume)
    assert not Path("run").exists()


def test_resume_and_overwrite_exclude_each_other(config):
    config.run.overwrite = True
    with pytest.raises(ValueError, match="--resume and run.overwrite true exclude each other"):
        open_folder(config, "auto")


def test_auto_begins_where_nothing_is_saved_and_checks_who_it_is(config):
    assert go_on(config).saved is None  # nothing at all: a new run
    first = begin(config)  # killed before its first checkpoint
    again = go_on(config)
    assert (again.identity.id, again.checkpoint) == (first.identity.id, None)
    assert again.lines == ["going on from the run in run, which has no checkpoint yet"]
    config.run.seed = 1
    with pytest.raises(ValueError, match="cannot go on from the run in run.*run.seed 0 -> 1"):
        go_on(config)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(config):
    begin(config)
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 42))
    Path("run/metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="metrics.jsonl up to step 41, but no checkpoint"):
        go_on(config)
    Path("run/metrics.jsonl").write_text('{"step": 40}\n')  # killed while its first one was written
    assert go_on(config).checkpoint is None


def other(value: object) -> object:
    if isinstance(value, bool):
        return not value
    return {"": "x", None: "x"}.get(value, value) if not isinstance(value, list) else ["other"]


@pytest.mark.parametrize("option", options_of(TapoConfig()))
def test_every_option_that_differs_is_shown_or_refused(config, option):
    """The run that was saved had another value of it."""
    kind, value = kind_of(option), options_of(config)[option]
    old = other(value) if other(value) != value else f"not {value}"
    folder = begin(config, 2, changed={option: old})
    if kind is Kind.FIXED:
        with pytest.raises(ValueError, match=rf"cannot go on from run/.*step_000002: {option} "):
            go_on(config)
        return
    found = go_on(config)
    (line,) = found.lines
    assert line.startswith("going on from run/checkpoints/step_000002") and f" {option} " in line
    assert list(found.changed) == [option] and found.identity.id == folder.identity.id
    if kind is Kind.STEP:
        with pytest.raises(ValueError, match=rf"saved within a step, .*{option} "):
            found.check_step()
    else:
        found.check_step()
        assert ("trained with" in line) == (kind is Kind.LISTED)


def test_without_changes_the_line_names_the_checkpoint_alone(config):
    begin(config, 2)
    assert go_on(config).lines == ["going on from run/checkpoints/step_000002"]


@pytest.mark.parametrize("name", ["source", "triplets", "photo_contents"])
def test_other_data_is_refused(config, name):
    begin(config, 2)
    folder = go_on(config)
    same = {"source": "s", "triplets": "t", "photo_contents": "p"}
    folder.note_data(same)
    assert folder.identity.data == same
    with pytest.raises(ValueError, match="the run in run cannot go on: .* changed since it began"):
        folder.note_data(same | {name: "other"})


def test_another_model_is_refused_and_a_moved_one_shown(config, tmp_path):
    begin(config, 2)
    Path("policy").rename("moved")
    config.model.path = "moved"
    assert "also changed: model.path policy -> moved" in go_on(config).lines[0]
    config.model.path = "elsewhere"
    with pytest.raises(ValueError, match=r"model.path policy -> elsewhere \(no such folder\)"):
        go_on(config)
    config.model.path = "policy"
    assert "model.path policy is gone" in go_on(config).lines[0]  # not needed any more
    Path("policy").mkdir()
    Path("policy/config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ValueError, match="policy -> policy .another model than the run began from"):
        go_on(config)


def test_lora_does_not_go_on_from_its_own_merged_weights(config):
    config.model.lora_rank = 4
    (Path("policy") / "config.json").write_text('{"model_type": "before"}')
    config.model.path = str(begin(config, 2).checkpoint)
    with pytest.raises(ValueError, match="step_000002 .LoRA weights of this run, merged already"):
        go_on(config)


def test_the_other_command_is_refused(config):
    begin(config, 2)
    sft = SftConfig()
    sft.model.path, sft.run.out, sft.run.device = "policy", "run", "cpu"
    with pytest.raises(ValueError, match=r"step_000002 with train/sft.py: it is of train/tapo.py"):
        go_on(sft)
    sft.run.out = "elsewhere"
    with pytest.raises(ValueError, match=r"with train/sft.py: it is of train/tapo.py. To begin"):
        go_on(sft, "run/checkpoints/step_000002")


def test_a_checkpoint_of_another_run_is_refused(config):
    theirs = begin(config, 2)
    config.run.out = "mine"
    mine = begin(config, 5)
    ids = f"of run {theirs.identity.id[:8]}, and run.out mine holds run {mine.identity.id[:8]}"
    with pytest.raises(ValueError, match=f"cannot resume from run/.*{ids}"):
        go_on(config, str(theirs.checkpoint))
    theirs.checkpoint.rename("mine/checkpoints/step_000009")
    read = read_complete(Path("mine/checkpoints/step_000009"))
    text = seal({k: v for k, v in read.items() if k != "checksum"} | {"serial": 9})
    Path("mine/checkpoints/step_000009", COMPLETE).write_text(text)
    with pytest.raises(ValueError, match=ids):
        go_on(config)
    config.run.out = "new"  # a run may move, checkpoint by checkpoint
    assert go_on(config, str(mine.checkpoint)).identity.id == mine.identity.id


def as_an_earlier_version(checkpoint: Path) -> None:
    complete = read_complete(checkpoint)
    kept = {name: complete[name] for name in ("step", "serial", "files")}
    (checkpoint / COMPLETE).write_text(json.dumps(kept, indent=1))


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_warning(config):
    folder = begin(config, 2)
    as_an_earlier_version(folder.checkpoint)
    config.optim.lr = 1e-3
    assert "optim.lr 1e-06 -> 0.001" in go_on(config).lines[0]  # its folder knows the run
    Path("run/identity.json").unlink()
    found = go_on(config)
    assert found.saved is None and "Warning: it is of an earlier version" in found.lines[0]
    sft = SftConfig()
    sft.model.path, sft.run.out, sft.run.device = "policy", "run", "cpu"
    with pytest.raises(ValueError, match="with train/sft.py: it is of train/tapo.py"):
        go_on(sft)


def test_a_damaged_identity_of_the_folder_is_made_up_for_by_the_checkpoints(config):
    """Whichever bit of it flips."""
    first = begin(config, 2)
    whole = Path("run/identity.json").read_bytes()
    assert read_identity(Path("run")) == first.identity
    for bit in range(0, 8 * len(whole), 61):
        Path("run/identity.json").write_bytes(flipped(whole, bit))
        assert read_identity(Path("run")) is None, bit
    found = go_on(config)
    assert found.identity.id == first.identity.id and found.saved.options == first.identity.options


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_checkpoint_whose_list_has_one_flipped_bit_is_passed_over(config):
    """Each bit of complete.json; some of them on disk."""
    newest = begin(config, 2, 4).checkpoint
    path = newest / COMPLETE
    whole = path.read_bytes()
    bits = range(8 * len(whole))
    assert complete_in(whole)["step"] == 4 and len(bits) > 20_000
    assert [bit for bit in bits if complete_in(flipped(whole, bit)) is not None] == []
    for bit in bits[::997]:
        path.write_bytes(flipped(whole, bit))
        with pytest.warns(UserWarning, match="step_000004 is passed over"):
            assert go_on(config).checkpoint.name == "step_000002"


EARLIER = {"step": 1, "serial": 9, "files": {}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "7",
        "[1]",
        '"text"',
        "[" * 100_000,
        '{"a":' * 100_000,
        "\0" * 512,
        '{"serial": ' + "9" * 5000 + "}",
        json.dumps(EARLIER | {"files": []}),
        json.dumps(EARLIER | {"serial": "9"}),
        json.dumps(EARLIER | {"serial": True}),
        json.dumps(EARLIER | {"serial": 1.5}),
        json.dumps(EARLIER | {"files": {"config.json": 5}}),
        json.dumps(EARLIER | {"files": {"config.json": {"size": 22}}}),
        json.dumps(EARLIER | {"files": {"config.json": {"size": "22", "crc32": None}}}),
        json.dumps(EARLIER | {"files": {"a\0b": {"size": 1, "crc32": 1}}}),
        json.dumps(EARLIER | {"files": {"x" * 5000: {"size": 1, "crc32": 1}}}),
        json.dumps(EARLIER | {"files": {"\ud800": {"size": 1, "crc32": 1}}}),
        json.dumps(EARLIER | {"files": {"..": {"size": 1, "crc32": 1}}}),
        json.dumps(EARLIER | {"checksum": 7}),
        json.dumps(EARLIER | {"checksum": "00000000", "identity": None}),
        seal({"step": 1}),
    ],
    ids=range(23),
)
def test_a_checkpoint_with_a_malformed_list_is_passed_over(config, content):
    newest = begin(config, 2, 4).checkpoint
    (newest / COMPLETE).write_text(content)
    with pytest.warns(UserWarning, match="step_000004 is passed over"):
        assert go_on(config).checkpoint == Path("run/checkpoints/step_000002")


def test_when_every_checkpoint_is_damaged_the_run_stops_and_says_so(config):
    newest = begin(config, 2, 4).checkpoint
    (newest / COMPLETE).write_text("[]")
    Path("run/checkpoints/step_000002/config.json").write_text("{")
    before = contents(Path("run"))
    with pytest.raises(
        ValueError,
        match="every checkpoint is damaged .step_000004: its complete.json cannot be read; "
        "step_000002: config.json has 1 bytes",
    ):
        go_on(config)
    assert contents(Path("run")) == before


def test_seals_hold_whatever_stands_in_them():
    for content in ({}, {"a": {"checksum": "00000000"}}, {"ü": '"checksum": "00000000"'}):
        text = seal(content)
        assert unseal(text.encode()) == content | {"checksum": json.loads(text)["checksum"]}
    assert unseal(b"\xff") is None and unseal(b"{}") is None


def test_two_runs_are_kept_out_of_one_folder(config):
    with open_folder(config, None) as folder:
        with pytest.raises(ValueError, match=f"run.out run is in use by process {os.getpid()} on"):
            open_folder(config, "auto")
        folder.check()
    assert begin(config, 1).checkpoint.name == "step_000001"


def test_a_start_that_is_refused_gives_the_lock_back(config):
    begin(config, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="holds a run already"):
            open_folder(config, None)


def test_the_lock_is_gone_with_its_process(config):
    """kill -9, while a process that it forked lives on; that one does not hold the lock."""
    ready, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        folder = open_folder(config, None)
        if os.fork() == 0:
            folder.lock.release()  # has no effect on its parent's
            os.write(tell, os.getpid().to_bytes(4, "little"))
        time.sleep(60)
        os._exit(0)
    orphan = int.from_bytes(os.read(ready, 4), "little")
    try:
        with pytest.raises(ValueError, match=f"run.out run is in use by process {holder} on"):
            open_folder(config, "auto")
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    try:
        os.kill(orphan, 0)  # it is there
        with open_folder(config, None) as folder:
            folder.check()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_file_system_without_locks_does_not_stop_a_run(config, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    folder = open_folder(config, None)
    folder.check()


def test_a_folder_that_was_removed_is_noticed_and_made_again_to_save(config):
    with open_folder(config, None) as folder:
        folder.write()
        checkpoints = Checkpoints(without_weights(), config.run, folder)
        Path("run").rename("gone")
        with pytest.raises(FileNotFoundError, match="run.out run was removed, moved or replaced"):
            folder.check()
        assert not Path("run").exists()
        saved = checkpoints.save(3, {})
        folder.check()
    assert identity_of(saved).id == read_identity(Path("run")).id == folder.identity.id


def test_nothing_is_saved_into_the_run_that_took_its_place(config):
    with open_folder(config, None) as folder:
        folder.write()
        checkpoints = Checkpoints(without_weights(), config.run, folder)
        Path("run").rename("gone")
        begin(config, 1)
        with pytest.raises(FileNotFoundError, match="removed, moved or replaced"):
            folder.check()
        with pytest.raises(ValueError, match="run.out run holds another run by now"):
            checkpoints.save(3, {})
        with open_folder(config, "auto") as theirs:
            with pytest.raises(ValueError, match="run.out run is in use by"):
                checkpoints.save(3, {})
            theirs.check()
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step_000001"]


def test_a_lock_file_that_was_cleaned_away_is_made_again(config):
    with open_folder(config, None) as folder:
        folder.write()
        Path("run/.lock").unlink()
        folder.check()
        with pytest.raises(ValueError, match="is in use by"):
            open_folder(config, "auto")


def test_a_restart_goes_on_with_the_run_that_this_torchrun_began(config, monkeypatch):
    first = begin(config, 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config.run.overwrite = True  # was for the first start
    with open_folder(config, None) as folder:
        assert (folder.identity.id, folder.checkpoint.name) == (first.identity.id, "step_000002")
    config.run.overwrite = False
    stored = replace(first.identity, launch=first.identity.launch | {"parent": "1 since 2"})
    replace(first, identity=stored).write()  # another torchrun's: its start was refused, and
    with pytest.raises(ValueError, match="run.out run holds a run already"):  # so is its restart
        open_folder(config, None)
    with open_folder(config, "auto") as folder:
        assert folder.checkpoint.name == "step_000002"


def test_nothing_is_warned_of_in_a_healthy_run(config):
    begin(config, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(config)
