"""The pool: order, time limits, deaths, groups, and no orphan left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from core import progress
from core.errors import InvalidInput
from core.parallel import Outcome, Pool, Progressed, Status, Task, parallel_map

STATE: list[int] = []


def slower_first(number: int) -> int:
    time.sleep(0.3 / (number + 1))
    return number * number


def misbehave(how: str) -> str:
    if how == "raise":
        raise ValueError("on purpose")
    if how == "exit":
        sys.exit(3)
    if how == "abort":
        print("last words", flush=True)
        os.abort()
    if how == "hang":
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        time.sleep(600)
    return how


def remember(number: int) -> tuple[int, list[int]]:
    STATE.append(number)
    return os.getpid(), list(STATE)


def environment_of(name: str) -> str | None:
    return os.environ.get(name)


def with_progress() -> None:
    with progress.progress("Counting", total=3) as bar:
        for _ in range(3):
            bar.advance()


def interval() -> tuple[float, float]:
    start = time.time()
    time.sleep(0.4)
    return start, time.time()


def outcomes_of(tasks: list[Task], **options: int) -> dict[str, Outcome]:
    with Pool(**options) as pool:
        for task in tasks:
            pool.submit(task)
        return {event.task.key: event for event in pool.events() if isinstance(event, Outcome)}


def test_results_come_in_the_order_of_the_items_though_the_first_is_slowest():
    assert [outcome.value for outcome in parallel_map(slower_first, range(4), jobs=4)] == [0, 1, 4, 9]


def test_a_task_that_raises_exits_aborts_or_hangs_is_reported_and_the_others_go_on():
    tasks = [Task(misbehave, (how,), key=how, time_limit=4) for how in ("raise", "exit", "abort", "hang", "fine")]
    ended = outcomes_of(tasks, jobs=3)
    assert ended["raise"].status is Status.RAISED
    assert "ValueError: on purpose" in ended["raise"].error
    assert ended["exit"].status is Status.RAISED
    assert "SystemExit: 3" in ended["exit"].error
    assert ended["abort"].status is Status.DIED
    assert f"signal {int(signal.SIGABRT)}" in ended["abort"].error
    assert "last words" in ended["abort"].error
    assert ended["hang"].status is Status.TIMED_OUT
    assert 4 <= ended["hang"].wall_s < 8
    assert ended["fine"].value == "fine"
    assert not [child for child in psutil.process_iter(["cmdline"]) if child.info["cmdline"] == ["sleep", "600"]]


def test_tasks_of_a_group_share_one_process_and_a_death_starts_a_fresh_one():
    tasks = [Task(remember, (number,), key=str(number), group="a") for number in (1, 2)]
    tasks += [Task(misbehave, ("abort",), key="abort", group="a"), Task(remember, (3,), key="3", group="a")]
    ended = outcomes_of(tasks, jobs=2)
    (first, _), (second, seen) = ended["1"].value, ended["2"].value
    assert first == second
    assert seen == [1, 2]
    assert ended["3"].value[0] != first
    assert ended["3"].value[1] == [3]


def test_the_declared_environment_is_set_in_the_worker_only():
    task = Task(environment_of, ("TENFOLD_TEST_FLAG",), key="x", environment={"TENFOLD_TEST_FLAG": "7"})
    assert outcomes_of([task])["x"].value == "7"
    assert "TENFOLD_TEST_FLAG" not in os.environ


def test_nothing_runs_beside_an_exclusive_task():
    tasks = [Task(interval, key=key, exclusive=key == "alone") for key in ("a", "b", "alone", "c", "d")]
    ended = outcomes_of(tasks, jobs=4)
    start, end = ended["alone"].value
    assert all(
        other[1] <= start or other[0] >= end for key, o in ended.items() if key != "alone" for other in [o.value]
    )


def test_progress_of_a_worker_reaches_the_parent():
    with Pool() as pool:
        pool.submit(Task(with_progress, key="x"))
        seen = [event.progress for event in pool.events() if isinstance(event, Progressed)]
    assert (seen[0].description, seen[0].total, seen[-1].completed) == ("Counting", 3, 3)


def test_a_closure_can_be_sent():
    factor = 7
    assert parallel_map(lambda item: item * factor, [2])[0].value == 14


def test_cpu_and_wall_time_are_measured():
    outcome = parallel_map(lambda n: sum(range(n)), [5_000_000])[0]
    assert 0.02 < outcome.cpu_s < 5
    assert outcome.wall_s > 0.05


def test_when_the_parent_is_killed_its_workers_and_their_children_end(tmp_path: Path):
    script = (
        "import subprocess, sys, time\n"
        "from core.parallel import parallel_map\n"
        f"note = {str(tmp_path / 'pids')!r}\n"
        "def hang(_):\n"
        "    import os, subprocess, time\n"
        "    child = subprocess.Popen(['sleep', '500'], start_new_session=True)\n"
        "    open(note + '.tmp', 'w').write(f'{os.getpid()} {child.pid}')\n"
        "    os.rename(note + '.tmp', note)\n"
        "    time.sleep(500)\n"
        "parallel_map(hang, [0])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(text) for text in (tmp_path / "pids").read_text().split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    parent.kill()
    parent.wait()
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _alive(pid)]


def test_zero_jobs_are_refused():
    with pytest.raises(InvalidInput, match="jobs=0"):
        Pool(jobs=0)


@pytest.mark.slow
def test_the_same_call_on_ray_gives_the_same_outcomes():
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    local = parallel_map(slower_first, range(3), jobs=2)
    on_ray = parallel_map(slower_first, range(3), jobs=2, ray_address="local")
    assert [outcome.value for outcome in on_ray] == [outcome.value for outcome in local]
    bad = parallel_map(misbehave, ["raise", "abort", "hang", "fine"], jobs=2, ray_address="local", time_limit=15)
    assert [outcome.status for outcome in bad] == [Status.RAISED, Status.DIED, Status.TIMED_OUT, Status.DONE]


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
