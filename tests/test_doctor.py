"""The doctor: what it says of a good machine and model, and of each fault that it looks for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sglang_support import FLAGS, PYTHON
from support import tiny

from tercet.core.config import TapoConfig
from tercet.train import doctor
from tercet.train.fit import inputs, machine
from tercet.train.fit.finding import run_check

ROOT = Path(__file__).resolve().parents[1]


def only(findings) -> tuple[str, str, str]:
    """Level, text and advice of the one finding."""
    (found,) = findings
    return found.level, found.said, found.advice


def configured(*argv: str) -> TapoConfig:
    return doctor.read(argv)[1]


@pytest.fixture
def photo_folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("red_bird", "blue_bird", "grey_bird", "pink_bird"):
        (tmp_path / "photos" / "bird" / name).mkdir(parents=True)
        for n in range(4):
            pixels = rng.integers(0, 255, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / "bird" / name / f"{n}.png")
    return tmp_path / "photos"


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny().save(tmp_path / "policy")
    return tmp_path / "policy"


def test_the_command_reports_every_check_and_ends_with_its_errors(
    saved, photo_folder, tmp_path, monkeypatch, capsys
):
    quick = {"triton": [], "all_reduce": []}
    for name, found in quick.items():
        monkeypatch.setattr(machine, name, lambda found=found: found)
    argv = [f"--model.path={saved}", f"--data.path={photo_folder}", "--data.shots=3"]
    argv += ["--data.sft_shots=0", f"--run.out={tmp_path / 'runs'}"]
    doctor.main([*argv, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [line["name"] for line in lines]
    assert names[0] == "python" and "weights" in names and names[-1] == "reward"
    assert {line["level"] for line in lines} <= {"ok", "warning"}
    (data,) = [line["said"] for line in lines if line["name"] == "data" and line["level"] == "ok"]
    # 60 % of four sub-categories are seen: two of three photos each.
    assert data == "6 anchors of 2 seen sub-categories in 1 super-categories; 10 held-out photos"

    (photo_folder / "bird" / "red_bird" / "0.png").write_bytes(b"no photo")
    with pytest.raises(SystemExit) as ended:
        doctor.main(argv)
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "ERROR    data" in shown and "red_bird/0.png" in shown
    assert "1 errors" in shown and "not looked at" not in shown


def test_options_of_the_run_and_flags_without_a_value_are_read():
    options, config = doctor.read(["--start_server", "--model.path", "m", "--json", "false"])
    assert options.start_server and not options.json and config.model.path == "m"
    assert not doctor.read([])[0].start_server
    with pytest.raises(ValueError, match="there is no option 'modell.path'"):
        doctor.read(["--modell.path", "m"])


def test_python_versions(monkeypatch):
    assert only(machine.python())[0] == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 13, 1, "final", 0))
    level, said, advice = only(machine.python())
    assert level == "error" and said.startswith("Python 3.13.1") and "make install" in advice


def test_packages_that_do_not_fit_are_named(monkeypatch):
    listed = ["numpy>=9999", "no-such-package>=2", "pillow>=1", 'flash-attn>=99; extra == "gpu"']
    monkeypatch.setattr(metadata, "requires", lambda name: listed)
    wrong, extra = machine.packages()
    assert wrong.level == "error"
    assert f"numpy {np.__version__} is installed, >=9999 is needed" in wrong.said
    assert "no-such-package is not installed (>=2 is needed)" in wrong.said
    assert "pillow" not in wrong.said
    assert extra.level == "ok" and "only a GPU needs it" in extra.said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [*machine.packages()][1].level == "warning"


def test_a_cpu_build_beside_a_gpu_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(machine.gpus())[0] == "warning"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA RTX A6000, 550.54.14, 49140'\n")
    tool.chmod(0o755)
    driver, gpu = machine.gpus()
    assert driver.said == "NVIDIA RTX A6000: driver 550.54.14, 49140 MiB"
    assert gpu.level == "error" and "CPU build" in gpu.said
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the driver" in [*machine.gpus()][1].advice
    card = SimpleNamespace(name="A6000", major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda n: (10 << 30, 48 << 30))
    used = [*machine.gpus()][1]
    assert used.level == "warning" and "sm_86, 10.0 of 48.0 GiB free" in used.said


def test_kernels_compile_or_are_said_to_be_interpreted(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert only(machine.triton())[0] == "warning"
    monkeypatch.delenv("TRITON_INTERPRET")
    from tercet.kernels import ahead_of_time

    monkeypatch.setattr(ahead_of_time.Kernel, "compile", lambda self, target: None)
    level, said, _ = only(machine.triton())
    assert level == "ok" and f"{len(ahead_of_time.kernels())} kernels compile for sm_86" in said

    def fails(self, target):
        raise RuntimeError("ptxas\nis missing")

    monkeypatch.setattr(ahead_of_time.Kernel, "compile", fails)
    assert only(run_check("triton", machine.triton))[:2] == (
        "error",
        "RuntimeError: ptxas is missing",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_kernel_runs_on_a_gpu():
    level, said, _ = only(machine.triton())
    assert level == "ok" and "its largest error is" in said


def test_room_on_the_disk_is_compared_with_the_checkpoints(saved, tmp_path, monkeypatch):
    config = configured(f"--model.path={saved}", "--run.keep_last=2", "--run.keep_best=accuracy")
    model = tiny().model
    # float32: 4 bytes of weight, 8 of states; two kept, the best, and one that is being written
    needed = 4 * sum(p.numel() for p in model.parameters()) * (4 + 8)
    assert inputs.checkpoint_bytes(config) == needed
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    assert only(machine.disk(tmp_path / "not" / "there", needed))[0] == "error"
    assert only(machine.disk(tmp_path / "not" / "there", needed - 1))[0] == "ok"
    assert only(machine.shared_memory())[0] == "warning"
    assert inputs.checkpoint_bytes(configured()) == 0


def test_a_taken_port_is_told(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(machine, "MASTER_PORT", taken.getsockname()[1])
        found = [*machine.ports()]
    assert found[0].level == "warning" and "--master-port" in found[0].advice
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a: (_ for _ in ()).throw(OSError("none")))
    assert "/etc/hosts" in [*machine.ports()][1].advice


def test_ranks_add_up_and_a_failure_is_told(monkeypatch):
    level, said, _ = only(machine.all_reduce())
    assert level == "ok" and "2 ranks over gloo: " in said
    assert float(said.split(": ")[1].split()[0]) > 0

    def breaks(*arguments, **options):
        return subprocess.CompletedProcess([], 1, "", "x\nRuntimeError: no route to host\ny")

    monkeypatch.setattr(subprocess, "run", breaks)
    assert only(machine.all_reduce())[:2] == (
        "error",
        "2 ranks over gloo failed: RuntimeError: no route to host",
    )

    def hangs(*arguments, **options):
        raise subprocess.TimeoutExpired("torchrun", 1)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert "did not finish" in only(machine.all_reduce())[1]


def test_weights_that_are_cut_or_missing_are_named(saved):
    file = saved / "model.safetensors"
    size = file.stat().st_size
    assert inputs.weights(saved) == (1, size)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"has {size - 1:,} bytes, its header says {size:,}"):
        inputs.weights(saved)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="is no safetensors file"):
        inputs.weights(saved)
    file.write_bytes((9).to_bytes(8, "little") + b'{"a": [1}')
    with pytest.raises(ValueError, match="its header is damaged"):
        inputs.weights(saved)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors is missing"):
        inputs.weights(saved)


def test_a_model_is_looked_at_without_its_weights(saved, monkeypatch):
    weights, model = inputs.model(configured(f"--model.path={saved}").model)
    assert weights.said.startswith("1 files") and model.level == "ok"
    assert model.said.startswith("qwen2_5_vl") and "one image pad" in model.said
    tokenizer = json.loads((saved / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{{ messages[0].content }}"
    (saved / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (saved / "chat_template.jinja").unlink(missing_ok=True)
    found = [*run_check("model", lambda: inputs.model(configured(f"--model.path={saved}").model))]
    assert [f.level for f in found if "image_pad" in f.said] == ["error"]


def test_a_hub_id_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    level, said, advice = only(inputs.model(configured("--model.path=some/model").model))
    assert level == "warning" and "hf download some/model" in advice
    level, said, _ = only(inputs.model(configured(f"--model.path={tmp_path}/typo").model))
    assert level == "error" and "typo' is no folder here" in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_our_own_warnings_are_findings_and_those_of_others_are_not(monkeypatch):
    def warns():
        warnings.warn("too few photos", stacklevel=1)
        warnings.warn_explicit("deprecated", UserWarning, "/elsewhere/library.py", 1)
        return []

    assert [*run_check("data", warns)] == []
    monkeypatch.setattr(sys.modules["tercet.train.fit.finding"], "__file__", __file__)
    assert only(run_check("data", warns))[:2] == ("warning", "too few photos")


def test_trackers_that_are_not_installed_are_named():
    assert only(inputs.trackers(configured()))[:2] == ("ok", "tensorboard")
    level, said, _ = only(inputs.trackers(configured("--run.log_to", "tensorboard", "swanlab")))
    assert find_spec("swanlab") or (level == "error" and "swanlab" in said)


def test_rewards_and_judges_are_tried(tmp_path, monkeypatch):
    assert only(inputs.reward(configured()))[:2] == ("ok", "fine_r1")
    missing = configured("--rollout.reward", "no_such_rewards:short")
    level, said, _ = only(run_check("reward", lambda: inputs.reward(missing)))
    assert level == "error" and "no_such_rewards" in said
    parts = ["--rollout.reward", "{judge_reasoning: 1.0}", "--rollout.judge_model", "j"]
    config = configured(*parts, "--rollout.judge_url", "http://127.0.0.1:9/v1")
    level, said, _ = only(run_check("reward", lambda: inputs.reward(config)))
    assert level == "error" and said.startswith("rollout.judge_url: ")


def test_environments_of_servers(tmp_path, monkeypatch):
    here = configured("--rollout.engine=sglang", f"--rollout.sglang_python={sys.executable}")
    monkeypatch.setattr(inputs, "LOOK", f'print(\'["{inputs.TESTED_SGLANG}", "2.11"]\')')
    assert only(inputs.servers(here))[:2] == (
        "ok",
        f"sglang {inputs.TESTED_SGLANG} with PyTorch 2.11",
    )
    monkeypatch.setattr(inputs, "LOOK", 'print(\'["0.0.1", "2.11"]\')')
    assert only(inputs.servers(here))[0] == "warning"
    monkeypatch.setattr(inputs, "LOOK", "import no_such_sglang")
    level, said, _ = only(inputs.servers(here))
    assert level == "error" and "ModuleNotFoundError: No module named 'no_such_sglang'" in said
    absent = configured("--rollout.engine=sglang", f"--rollout.sglang_python={tmp_path}/python")
    assert only(inputs.servers(absent))[0] == "error"
    assert only(inputs.servers(configured("--rollout.engine=sglang")))[0] == "error"


def test_the_tested_sglang_is_that_of_the_tests():
    pinned = (ROOT / "tests" / "sglang_cpu" / "requirements.txt").read_text()
    assert f"sglang=={inputs.TESTED_SGLANG}\n" in pinned


def test_servers_that_do_not_answer_are_named():
    config = configured("--rollout.engine=sglang", "--rollout.urls", "http://127.0.0.1:9")
    level, said, _ = only(inputs.servers(config))
    assert level == "error" and "http://127.0.0.1:9 does not answer" in said


@pytest.mark.sglang
@pytest.mark.skipif(not PYTHON, reason="no SGLang server: run make test-sglang")
def test_a_real_server_is_started_and_stopped(saved):
    config = configured(
        "--rollout.engine=sglang",
        f"--rollout.sglang_python={PYTHON}",
        f"--model.path={saved}",
        "--rollout.sglang_args",
        " ".join(FLAGS[: -len(inputs.SAME_PIXELS)]),
    )
    assert only(inputs.servers(config))[0] == "ok"
    level, said, _ = only(inputs.started_server(config))
    assert level == "ok" and "started, answered and was stopped" in said
    broken = configured(f"--rollout.sglang_python={sys.executable}", f"--model.path={saved}")
    assert only(inputs.started_server(broken))[0] == "error"
