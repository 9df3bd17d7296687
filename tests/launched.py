"""What `test_launch.py` launches: examples/pretrain.py on CPUs.

If STOP names a signal, the launcher gets it in step 4, as from a scheduler. Accelerate takes its ways for FSDP and
DeepSpeed on GPUs only, so it is told that a CPU is one; all else is real.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torchvision_ops as torchvision_ops  # before transformers, which imports torchvision where there is one
from accelerate.state import DistributedType, PartialState

from tve_hf.pretrain import loop

if os.environ["ACCELERATE_USE_CPU"] == "false":
    PartialState._prepare_backend = lambda self, *settings: ("gloo", DistributedType.MULTI_GPU)

take_step = loop.take_step


def stop_in_step_4(run: Any, *arguments: Any) -> Any:
    if run.done == 3 and run.rank == 0:
        os.kill(os.getppid(), getattr(signal, os.environ["STOP"]))
        handler: Any = signal.getsignal(signal.SIGTERM)
        for _ in range(600):
            if handler.__self__.asked:
                break
            time.sleep(0.1)
    return take_step(run, *arguments)


if "STOP" in os.environ:
    loop.take_step = stop_in_step_4
script = Path(__file__).resolve().parents[1] / "examples" / "pretrain.py"
sys.argv[0] = str(script)
runpy.run_path(str(script), run_name="__main__")
