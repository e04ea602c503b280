"""改坏的输入，一直试到时间用完：每一个都该读得懂，或得到一行 ``DistillabError``。

    python tests/fuzz --minutes 10 [READER ...]

别的异常、超过 ``--hang`` 秒、悄悄读出了不同的东西，都算失败：印出 traceback 的末尾与重做它的种子，
同一处只印一次。``--examples N`` 改为每个读者试 N 个。有失败时退出码是 1。
"""

import argparse
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "e2e")]

from readers import READERS, Reader  # noqa: E402

from distillab.errors import DistillabError  # noqa: E402


class Hang(KeyboardInterrupt):
    """太久了；``foreign`` 放 ``KeyboardInterrupt`` 过去。"""


def attempt(reader: Reader, seed: int, hang: int, outcomes: Counter, seen: set) -> None:
    """一个输入；失败的只在第一次印出来。"""
    signal.alarm(hang)
    try:
        reader.read(Random(seed))
        outcomes["read"] += 1
    except DistillabError as error:
        outcomes["one line"] += 1
        if "\n" in str(error).strip():
            _failed("several lines", f"{reader.name} {seed}", str(error), outcomes, seen)
    except Hang:
        place = traceback.format_exc().splitlines()[-3]
        _failed("hang", f"{reader.name} {seed}", place, outcomes, seen)
    except AssertionError as error:
        _failed("silent change", f"{reader.name} {seed}", str(error), outcomes, seen)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "/distillab/" in f.filename]
        last = (own or frames)[-1]
        what = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
        _failed(
            "traceback", f"{reader.name} {seed}", f"{what}: {error}"[:300], outcomes, seen, what
        )
    finally:
        signal.alarm(0)


def _failed(kind, where, what, outcomes, seen, place=None):
    outcomes[kind] += 1
    place = (kind, where.split()[0], place or what[:80])
    if place not in seen:
        seen.add(place)
        print(f"{kind}: {where}: {what}", flush=True)


def main() -> int:
    """跑完，印表。"""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)}; default: all")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--hang", type=int, default=20, help="seconds")
    parser.add_argument("--seed", type=int, help="only this input, with its traceback")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    def alarm(*_):
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    bad = False
    for name in options.readers or READERS:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
            reader = READERS[name](Path(directory))
            if options.seed is not None:
                reader.read(Random(options.seed))
                continue
            seconds = options.minutes * 60 / len(options.readers or READERS)
            bad |= campaign(reader, seconds, options.examples, options.hang)
    return int(bad)


def campaign(reader: Reader, seconds: float, examples: int | None, hang: int) -> bool:
    """试一个读者，印一行结果；有没有失败的。"""
    outcomes, seen, started = Counter(), set(), time.monotonic()

    @settings(max_examples=200, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**32 - 1))
    def batch(seed):
        attempt(reader, seed, hang, outcomes, seen)

    while outcomes.total() < (examples or 2**63) and (
        examples is not None or time.monotonic() - started < seconds
    ):
        batch()
    bad = {kind: n for kind, n in outcomes.items() if kind not in ("read", "one line")}
    print(f"{reader.name}: {outcomes.total():,} inputs in {time.monotonic() - started:.0f} s: "
          f"{outcomes['read']:,} read, {outcomes['one line']:,} one line, "
          f"{', '.join(f'{n:,} {kind}' for kind, n in bad.items()) or 'nothing else'}",
          flush=True)  # fmt: skip
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
