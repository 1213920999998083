"""Runs of several processes for tests: imported once, then a fork per process.

`Nursery.run(jobs)` starts one process per job (config file, run folder, overrides), with the
environment that torchrun gives its workers, and waits for them; `Nursery.start` does not wait.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAIN = """
import json, os, sys
import torch
torch.set_num_threads(1)
import torch.distributed.fsdp, torch.distributed.tensor.parallel
from endside import cli
from endside.train import pretrain
from endside.formats import hf
torch.optim.AdamW([torch.zeros(1)])  # imports what the first optimizer of a process imports
for line in sys.stdin:
    job = json.loads(line)
    children = []
    # The launcher's store, which outlives every process of the run.
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    if job["size"] > 1:
        job["environment"]["MASTER_PORT"] = str(store.port)
    for rank in range(job["size"]):
        child = os.fork()
        if child == 0:
            os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
            log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                cli.main(job["argv"])
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(end.code)
            finally:
                import traceback
                if sys.exc_info()[0] not in (None, SystemExit):
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitpid(child, 0)[1] for child in children]), flush=True)
"""


class Nursery:
    """A process that has imported everything and forks the processes of runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._errors = open(folder / "stderr", "w")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-c", MAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env=environment,
        )  # fmt: skip

    def start(self, size: int, argv: list[str]) -> list[int]:
        """Begin `endside argv` in `size` processes -> their numbers."""
        place = {
            "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        job = {
            "size": size, "argv": argv, "log": str(self.folder / "log"),
            "environment": place if size > 1 else {},
        }  # fmt: skip
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def wait(self) -> list[int]:
        """How each process of the last start ended: its exit code, or minus its signal."""
        statuses = json.loads(self._process.stdout.readline())
        return [os.waitstatus_to_exitcode(status) for status in statuses]

    def run(self, size: int, argv: list[str]) -> list[int]:
        """Start, and wait for the end."""
        self.start(size, argv)
        return self.wait()

    def log(self, rank: int) -> str:
        """What a process of the last start has printed."""
        return (self.folder / f"log.{rank}").read_text()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._errors.close()
