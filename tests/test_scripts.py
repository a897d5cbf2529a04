"""The scripts for a machine with a GPU, where they can run without one."""

import os
import subprocess
from pathlib import Path

import numpy as np
from test_data import needs_torchvision, save_image

from ddpp import runs

ROOT = Path(__file__).resolve().parent.parent
TOY = [
    *("--no-zca", "--width", "8", "--threads", "1", "--teachers-count", "1", "--teachers-epochs", "2"),
    *("--max-start-epoch", "1", "--teacher-span", "1", "--steps", "2", "--inner-steps", "2"),
    *("--evaluate-networks", "2", "--evaluate-epochs", "2"),
]


@needs_torchvision
def test_cifar10_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for part, name, number in ((p, n, k) for p in ("train", "test") for n in ("cat", "dog") for k in range(4)):
        save_image(tmp_path / "pictures" / part / name / f"{number}.png", draw.integers(0, 256, (32, 32, 3)))
    out = tmp_path / "out"
    command = [str(ROOT / "scripts" / "cifar10.sh"), str(tmp_path / "pictures"), str(out), *TOY]
    environment = os.environ | {"DDPP_BUILD_EXTENSION": "0"}
    cut = subprocess.run([*command, "--method", "nothing"], env=environment, capture_output=True, text=True)
    assert cut.returncode == 2 and "unknown method 'nothing'" in cut.stderr
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    kept = (out / "ddpp" / "results.json").read_bytes()
    (out / "mtt" / "results.json").unlink()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (out / "ddpp" / "results.json").read_bytes() == kept
    assert again.stdout.splitlines()[-2].startswith("ddpp: ") and again.stdout.splitlines()[-1].startswith("mtt: ")
    assert runs.read_json(out / "difference.json")
