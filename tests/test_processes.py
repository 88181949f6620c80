"""What a replica's process is set up with before it works: OpenMP's spinning, its priority, who comes first."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys

import pytest

import deployments

MODULES = sorted(module.name for module in pkgutil.iter_modules(deployments.__path__))
SETTINGS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}

_WHAT_TORCH_FINDS = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
print("no torch")
"""

_THREADS_AFTER = """
import os, sys, threading
from deployments.priority import take_a_place

def niceness():
    return [os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")]

os.setpriority(os.PRIO_PROCESS, 0, 15)
end = threading.Event()
for _ in range(3):
    threading.Thread(target=end.wait).start()
take_a_place()
print(*niceness())
end.set()
"""

_SCHEDULES_AFTER = """
import os, threading
from deployments.priority import take_a_place
from taps.engine.threads import computing

def schedules():
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}

end = threading.Event()
threading.Thread(target=end.wait).start()
take_a_place()
print(schedules() == {os.SCHED_BATCH})
found = []
def compute():
    computing(2)()
    started = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
    started.start()
    started.join()
    found.append(os.sched_getscheduler(0))
step = threading.Thread(target=compute)
step.start()
step.join()
print(found == [os.SCHED_OTHER] * 2)
later = threading.Thread(target=lambda: print(os.sched_getscheduler(0) == os.SCHED_BATCH))
later.start()
later.join()
end.set()
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    """What `code` prints in a process of its own, as if nothing had set what is tested here."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=kept | environment,
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return ran.stdout.strip()


@pytest.mark.parametrize("module", ["taps", *(f"deployments.{name}" for name in MODULES)])
def test_openmp_is_set_before_any_module_loads_torch(module: str) -> None:
    """Each module is what a replica may load first."""
    assert run(_WHAT_TORCH_FINDS, module) in ("20000", "no torch")


def test_most_modules_do_load_torch() -> None:
    """Else the test above would hold of anything."""
    assert run(_WHAT_TORCH_FINDS, "deployments.verifier") == "20000"


def test_a_waiting_policy_of_the_users_own_is_left() -> None:
    assert run(_WHAT_TORCH_FINDS, "deployments.verifier", OMP_WAIT_POLICY="active") == "None"


def may_raise_priority() -> bool:
    code = "import os; os.setpriority(0, 0, 15); os.setpriority(0, 0, 0)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_every_thread_of_a_replica_gets_normal_priority() -> None:
    niceness = run(_THREADS_AFTER).split()
    assert len(niceness) >= 4
    assert set(niceness) == ({"0"} if may_raise_priority() else {"15"})


def test_a_niceness_that_was_asked_for_is_left() -> None:
    assert "15" in run(_THREADS_AFTER, RAY_worker_niceness="15").split()


def test_what_computes_is_not_interrupted_by_the_other_threads_of_a_replica() -> None:
    """Nor is what it starts; others are scheduled in batches, and so are those that these start."""
    assert run(_SCHEDULES_AFTER).split() == ["True"] * 3


def test_what_ray_starts_interrupts_nothing_that_computes() -> None:
    code = "import os; print(os.sched_getscheduler(0) == os.SCHED_BATCH)"
    command = [sys.executable, "-m", "cluster.haproxy", sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.strip() == "True"
