"""Run in each of two processes by the fixtures of `conftest.py`: some jobs in a row, for one start of Python each.

    worker.py MODEL FOLDER JOB [JOB ...]

Each process writes what it saw to FOLDER/rankR.json. DDP jobs come before those under FSDP2, into which a process can
change but not out of it again.
"""

import gc
import json
import os
import sys

import accelerate.state
from accelerate.utils import DistributedType

from tests.distributed import compact, fast_step, layouts, two_ranks


JOBS = {
    "two_ranks": two_ranks.run_all,
    "fast_step_ddp": lambda model, folder: fast_step.run_all(fast_step.DDP, model, folder),
    "fast_step_fsdp2": lambda model, folder: fast_step.run_all(fast_step.FSDP2, model, folder),
    "layouts_ddp": lambda model, folder: layouts.run_all(layouts.TRAININGS, model, folder),
    "layouts_fsdp2": lambda model, folder: layouts.run_all(layouts.FSDP2, model, folder),
    "compact_ddp": compact.run,
    "compact_fsdp2": compact.run,
    "manifest": layouts.manifest,
    "resume": layouts.resume,
}


def let_accelerate_shard_on_cpu() -> None:
    """accelerate heeds ACCELERATE_USE_FSDP only where there is an accelerator, but torch shards over gloo as well."""
    original = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            # Every later state copies its attributes from the partial one.
            self.distributed_type = DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = init


if __name__ == "__main__":
    model, folder, *jobs = sys.argv[1:]
    rank = os.environ["RANK"]
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # the launcher sets it for all jobs
    gc.freeze()  # accelerate collects garbage in every run, and among all that was imported that takes longer than it
    results = {}
    for job in jobs:
        if job.endswith("fsdp2") and "ACCELERATE_USE_FSDP" not in os.environ:
            os.environ["ACCELERATE_USE_FSDP"] = "true"
            let_accelerate_shard_on_cpu()
        results[job] = JOBS[job](model, f"{folder}/rank{rank}/{job}")
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump(results, file)
    os._exit(0)  # freeing the process group at the interpreter's end may hang (see scripts/train.py)
