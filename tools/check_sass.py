"""Registers, spills and load widths of the compiled CUDA kernels, without a GPU.

    python tools/check_sass.py ddpp/_cuda.abi3.so --arch sm_90

Ends with 1 when a kernel spills, uses too many registers, loads mostly less than the 16 bytes that its name promises
(<float, 4> and <double, 2> are an element type and the elements of a pack, perhaps behind a bool; 8 bytes for
<Bfloat16, 4>), or stores values of at most 4 bytes one by one there.
Needs cuobjdump and nvdisasm: from the CUDA toolkit, from the triton wheel that CUDA builds of torch bring
along, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

#: Which loads are as wide as the packs of a kernel, and which are narrower.
PACKS = {
    "float, 4": ("LDG128", ("LDG", "LDG64")),
    "double, 2": ("LDG128", ("LDG", "LDG64")),
    "Bfloat16, 4": ("LDG64", ("LDG",)),
}
#: Values that a kernel handles beside its packs: loads for each load of a pack, and stores; a tail's one elsewhere.
SINGLE = {"cotangents_kernel": (0, 6), "gradients_kernel": (1, 1)}


def tool_folder() -> Path:
    places = [Path(exe).parent] if (exe := shutil.which("cuobjdump")) else []
    places += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    if (spec := importlib.util.find_spec("triton")) and spec.submodule_search_locations:
        places.append(Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin")
    for place in places:
        if (place / "cuobjdump").exists() and (place / "nvdisasm").exists():
            return place
    sys.exit("cuobjdump and nvdisasm not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def kind(operation: str) -> str:
    """The class of a memory operation; nothing for others."""
    if operation.startswith(("LDL", "STL")):
        return "SPILL"
    if operation.startswith(("LDG", "STG")) and operation != "LDGDEPBAR":
        return operation[:3] + ("128" if ".128" in operation else "64" if ".64" in f"{operation}." else "")
    return ""


def inspect(library: str, arch: str) -> dict[str, dict[str, int]]:
    """For each kernel: REG, STACK, LOCAL, SHARED in bytes, and how many memory operations of each kind."""
    folder = tool_folder()
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}  # cuobjdump runs nvdisasm

    def dump(flag: str) -> str:
        command = [str(folder / "cuobjdump"), flag, "-arch", arch, library]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    kernels: dict[str, dict[str, int]] = {}
    for name, row in re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", dump("-res-usage")):
        kernels[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", row)}
    name = ""
    for line in dump("-sass").splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found[1]
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", line):
            key = kind(found[1])
            kernels[name][key] = kernels[name].get(key, 0) + 1
    return kernels


def readable(name: str) -> str:
    """A kernel's name without namespaces and parameters."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
    text = re.sub(r"^void |\(anonymous namespace\)::|ddpp::|_INTERNAL\w+::|_GLOBAL__N\w+::", "", text)
    return re.sub(r"(>|\w)\((?!int\)).*$", r"\1", text)


def narrow(name: str, row: dict[str, int]) -> bool:
    """Whether a kernel that works on packs loads or stores them in parts."""
    loads, stores = SINGLE.get(name.partition("<")[0], (0, 1))
    for pack, (whole, parts) in PACKS.items():
        if re.search(rf"<((true|false), )?{pack}\b", name.replace("(int)", "")):
            packs, singles = row.get(whole, 0), sum(row.get(part, 0) for part in parts)
            return singles - loads * packs >= packs or row.get("STG", 0) > stores
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--max-registers", type=int, default=128)
    arguments = parser.parse_args()
    kernels = inspect(arguments.library, arguments.arch)
    if not kernels:
        sys.exit(f"no kernel for {arguments.arch} in {arguments.library}")
    bad = 0
    for name, row in sorted(kernels.items(), key=lambda item: readable(item[0])):
        short = readable(name)
        spills = row["LOCAL"] or row["STACK"] or row.get("SPILL")
        verdict = "spills" if spills else "narrow" if narrow(short, row) else "ok"
        if row["REG"] > arguments.max_registers:
            verdict = "registers"
        bad += verdict != "ok"
        print(f"{verdict:10}{short:48}", " ".join(f"{key}={value}" for key, value in row.items() if key))
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
