"""The scripts for a machine with a GPU, where they can run without one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_data import needs_torchvision, save_image

from ddpp import runs

ROOT = Path(__file__).resolve().parent.parent
TOY = [
    *("--no-zca", "--width", "8", "--threads", "1", "--teachers-count", "1", "--teachers-epochs", "2"),
    *("--max-start-epoch", "1", "--teacher-span", "1", "--steps", "150", "--inner-steps", "2"),
    *("--checkpoint-every", "1", "--evaluate-networks", "2", "--evaluate-epochs", "2"),
]


@needs_torchvision
def test_cifar10_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for part, name, number in ((p, n, k) for p in ("train", "test") for n in ("cat", "dog") for k in range(4)):
        save_image(tmp_path / "pictures" / part / name / f"{number}.png", draw.integers(0, 256, (32, 32, 3)))
    out = tmp_path / "out"
    command = [str(ROOT / "scripts" / "cifar10.sh"), str(tmp_path / "pictures"), str(out), *TOY]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"DDPP_BUILD_EXTENSION": "0", "PATH": path}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL) as cut:
        while not (out / "ddpp" / "checkpoint.safetensors").exists():
            assert cut.poll() is None
            time.sleep(0.01)
        os.killpg(cut.pid, signal.SIGKILL)
    assert not (out / "ddpp" / "results.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for method in ("ddpp", "mtt"):
        assert len(runs.read_log(out / method / "log.jsonl")) == 150
        assert f"\n{method}: " in done.stdout
    assert runs.read_json(out / "difference.json")


@pytest.mark.parametrize(("required", "code"), [("reference", 0), ("reference,none", 1)])
def test_processes_beside_each_other_tell_what_they_ran(required: str, code: int) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    tests = [str(ROOT / "tests" / "test_op_contract.py"), "-k", "reference and is_the_one_it_says"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", *tests]
    environment = os.environ | {"DDPP_REQUIRE_BACKENDS": required}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert " passed" in done.stdout
    assert done.returncode == code, done.stdout
