"""What machine a table was measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Its name, with family and model: a name such as AMD EPYC is that of several generations."""
    path = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in path.read_text().splitlines()) if path.exists() else ()
    found = {name.strip(): value.strip() for name, _, value in pairs}
    if "model name" not in found:
        return platform.processor()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"
