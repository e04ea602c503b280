"""``benchmarks/gpu.py``，另加几段不像样的：挂住的、崩溃的、没有时间的；几个同类假装没有装。"""

import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]

import gpu  # noqa: E402
import gpu_sections  # noqa: E402
import gpu_work  # noqa: E402

PEERS = {"trl", "liger_kernel", "deepspeed"}
found = gpu_work.find_spec


def hangs(work):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    work.record("before", "", "kept", pid=child.pid)
    time.sleep(600)


def crashes(work):
    work.record("before", "", "kept")
    raise ValueError("on purpose")


def late(work):
    raise AssertionError("this section has no time")


def needing(work):
    raise AssertionError("this section needs what nobody has")


if __name__ == "__main__":
    gpu_work.find_spec = lambda name: None if name in PEERS else found(name)
    gpu_work.NEEDS_OF["needing"] = ("torch", "a_library_nobody_has")
    more = {"hangs": (0.15, ""), "crashes": (1.0, ""), "late": (1e-9, ""), "needing": (1.0, "")}
    for name in more:
        setattr(gpu_sections, name, globals()[name])
    gpu.SECTIONS = {"machine": gpu.SECTIONS["machine"], **more, **gpu.SECTIONS}
    sys.exit(gpu.main(sys.argv[1:]))
