"""One of several processes that train together: `python two_processes.py FOLDER DEVICES STEPS`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    folder, devices, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    from recexplore.distributed import partitioning, processes
    from recexplore.errors import Preempted

    processes.initialize()
    from copying_task import Copying, run

    def say(step):
        print(f"step {step}", flush=True)

    try:
        run(
            folder,
            steps=steps,
            data=Copying(before=say),
            evaluate_every=10,
            log_every=1,
            make_mesh=lambda: partitioning.make_mesh(data=1, fsdp=-1),
        )
    except Preempted as preempted:
        print(preempted, flush=True)
        sys.exit(143)
