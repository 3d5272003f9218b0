"""Run stages as one of several processes, for test_distributed.py. Jobs and results are lines of JSON.

    torchrun … ranks.py '[JOB, …]'   this process is a rank and runs the jobs one after the other
    python ranks.py                  reads jobs from stdin and forks two ranks for each: the imports take seconds only once

job     {"stage", "argv", "port" or "next_port"}; optional:
        "fault": [[rank, step, action], …]   action: the name of a signal, or "sleep"
        "set": {name in utils.distributed: value}
        "cwd": [folder of each rank]
        "one_node": true                     kill the other rank when one fails, as torchrun does on one node
result  [{"code", "out", "err"} of each rank]
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import cli

# isort: split
import create_encodings
import infer
import train_diffusion
import train_vae
from training import trainer
from training.trainer import Trainer
from utils import distributed

STAGES = {"train_vae": train_vae, "create_encodings": create_encodings, "train_diffusion": train_diffusion, "infer": infer}
JOB_SECONDS = 150
train_step = Trainer.step
trainer.plot_curves = lambda folder: None  # takes longer than these tiny trainings


def run_job(stage: str, argv: list[str], fault: list = [], set: dict = {}, **_) -> int:
    def step(self, forward_backward):
        for rank, step, action in fault:
            if (rank, step) == (distributed.rank(), self.steps_done):
                time.sleep(600) if action == "sleep" else os.kill(os.getpid(), signal.Signals[action])
        train_step(self, forward_backward)

    Trainer.step = step
    for name, value in set.items():
        setattr(distributed, name, timedelta(seconds=value) if name.endswith("TIMEOUT") else value)
    return STAGES[stage].main(argv)


def start_rank(rank: int, job: dict, outputs: list) -> int:
    """Fork a rank and return its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(job["port"])
        cli.IS_MAIN = rank == 0  # was set by the import
        os.chdir(job["cwd"][rank] if "cwd" in job else ".")
        for descriptor, file in zip((1, 2), outputs):
            os.dup2(file.fileno(), descriptor)
        code = run_job(**job)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_forked(job: dict) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[open(Path(folder, f"{name}{rank}"), "w+") for name in ("out", "err")] for rank in range(2)]
        running = {start_rank(rank, job, outputs[rank]): rank for rank in range(2)}
        codes, deadline = [0, 0], time.monotonic() + JOB_SECONDS
        while running:
            time.sleep(0.05)
            ended = {pid: status for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in running) if pid}
            for pid, status in ended.items():
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            for pid in running:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                elif job.get("one_node") and any(codes):
                    os.kill(pid, signal.SIGKILL)
        texts = [[file.seek(0) or file.read() for file in files] for files in outputs]
    return [{"code": code, "out": out, "err": err} for code, (out, err) in zip(codes, texts)]


if __name__ == "__main__":
    if "RANK" in os.environ:
        for job in json.loads(sys.argv[1]):
            if code := run_job(**job):
                sys.exit(code)
            # The agent's store still has the keys of this process group: the next one needs another store.
            os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
            os.environ["MASTER_PORT"] = str(job["next_port"])
    else:
        for line in sys.stdin:
            print(json.dumps(run_forked(json.loads(line))), flush=True)
