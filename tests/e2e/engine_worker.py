"""一个进程组里依次跑几条 ``distillab`` 命令，只起一次进程。

``main`` 的参数是 ``ENGINE '[["train", "recipe.yaml", ...], ...]'``。一条失败就停，退出码是它的。
Accelerate 只在 GPU 上启用 FSDP；在 CPU 上要在它造好状态之后改写，这里就是做这件事的地方。
"""

import json
import os
import sys


def use(engine: str) -> None:
    if engine.startswith("zero"):
        os.environ |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "DS_ACCELERATOR": "cpu",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": engine.removeprefix("zero"),
        }
        return
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if engine != "fsdp2":
        return
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }


def pretend_fsdp(precision: str) -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    Accelerator(cpu=True, mixed_precision=precision)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()


def main() -> None:
    engine, commands = sys.argv[1], json.loads(sys.argv[2])
    use(engine)
    from accelerate.state import AcceleratorState

    from distillab.cli import main as distillab

    for command in commands:
        AcceleratorState._reset_state(reset_partial_state=True)
        if engine == "fsdp2":
            pretend_fsdp("bf16" if "train.precision=bf16" in command else "no")
        sys.argv = ["distillab", *command]
        try:
            distillab()
        except SystemExit as done:
            if done.code:
                raise
