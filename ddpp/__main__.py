"""``python -m ddpp STAGE ...``: the same as ``python -m ddpp.STAGE ...``."""

from __future__ import annotations

import importlib
import sys

from ddpp.errors import nearest

STAGES = {
    "teachers": "train teachers on the real data and keep their parameters",
    "distill": "distil a data set (trains missing teachers first, evaluates at the end)",
    "evaluate": "train networks on a distilled set and test them",
    "report": "write a run's pictures and tables anew",
    "export": "write a run's set for other programs",
    "reproduce": "run the paper's tables: every method, beside the published figures",
    "compare": "two sets of runs against each other, with the interval of the difference",
    "table": "a table of any finished runs, for ablations and papers",
    "continual": "learn classes group by group with a distilled memory",
    "search": "rank networks on a distilled set",
    "profile": "where the time and memory of an outer step go",
    "info": "what was built and which backend each op uses here; --presets: published settings",
}


def main(argv: list[str]) -> int:
    if argv and argv[0] in STAGES:
        return int(importlib.import_module(f"ddpp.{argv[0]}").main(argv[1:]) or 0)
    if argv and argv[0] not in ("-h", "--help"):
        print(
            f"ddpp: error: unknown stage {argv[0]!r}{nearest(argv[0], STAGES)} Known: {', '.join(STAGES)}",
            file=sys.stderr,
        )
        return 2
    print("usage: python -m ddpp STAGE [options]\n")
    for name, text in STAGES.items():
        print(f"  {name:10}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
