"""A NVIDIA FLARE job that starts `milkglass join` at each site and watches it; docs/nvflare.md says how to set it up.

It goes to `local/custom/` of the start-up kits. What it runs is the site's own script, `local/milkglass.sh FOLDER`: a
job names the run, and decides nothing else. No tensor goes through FLARE: a site tells its exit code and three counts,
which the server of the training knows anyway. The run's folder holds a key and weights, and so it lies outside the
job's workspace, which FLARE manages.
"""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Final, final

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

TOLD: Final = ("messages", "bytes_sent", "bytes_received")


@final
class Join(Executor):
    """At a site: starts the script, waits until it ends or FLARE aborts the job, and tells how it went."""

    def __init__(self, run: str) -> None:
        super().__init__()
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", run):
            raise ValueError(f"run {run!r}: expected letters, digits, '.', '_' and '-'")
        self._run = run

    def execute(self, _task_name: str, _data: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Run it; what it prints is in a file beside the run's folder."""
        site = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()).resolve()
        folder = site / "milkglass" / self._run
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        with (folder.parent / f"{self._run}.log").open("ab") as log:
            command = ["/bin/sh", str(site / "local" / "milkglass.sh"), str(folder)]
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
                while process.poll() is None and not abort_signal.triggered:
                    time.sleep(0.5)
                process.kill()  # no harm where it has ended: a run that is killed goes on with --resume
        reply = make_reply(ReturnCode.OK if process.returncode == 0 else ReturnCode.EXECUTION_EXCEPTION)
        reply["exit_code"] = process.returncode
        if process.returncode == 0:
            summary = json.loads((folder / "summary.json").read_text())
            reply.update({name: summary[name] for name in TOLD})
        return reply


@final
class Watch(Controller):
    """At FLARE's server: sends each site the task, and logs what they tell. Where one fails, the job does."""

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to prepare."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """One task, until all have answered."""
        sites = fl_ctx.get_engine().get_clients()
        task = Task(name="join", data=Shareable(), result_received_cb=self._hear)
        self.broadcast_and_wait(task, fl_ctx, sites, min_responses=len(sites), abort_signal=abort_signal)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to clear away."""

    def process_result_of_unknown_task(self, *_: object) -> None:
        """Nothing waits for a late answer."""

    def _hear(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        name, result = client_task.client.name, client_task.result
        self.log_info(fl_ctx, f"{name}: " + ", ".join(f"{key} {result.get(key)}" for key in ("exit_code", *TOLD)))
        if result.get_return_code() != ReturnCode.OK:
            self.system_panic(f"{name}: milkglass ended with exit code {result.get('exit_code')}", fl_ctx)
