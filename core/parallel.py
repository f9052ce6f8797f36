"""Many tasks over processes or a Ray cluster: ordered results, time limits, every worker killable.

    outcomes = parallel_map(train_one, seeds, jobs=4, time_limit=600)

Tasks that share a `group` run one after another in one fresh process, which keeps what it has imported and loaded; a
worker that dies or is killed takes only its running task with it. `Pool` is the same for callers that want events as
they happen or add tasks on the way.
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import cloudpickle
import psutil

from core import progress
from core.errors import InvalidInput, NeedsHardware, require
from core.progress import ProgressEvent


class Status(StrEnum):
    """How a task ended."""

    DONE = "done"
    RAISED = "raised"
    TIMED_OUT = "timed out"
    DIED = "died"


@dataclass(frozen=True)
class Task:
    """A call to be made in a worker.

    `environment` is set before the worker's interpreter starts (a group's first task
    decides); `time_limit` is in wall seconds and includes the worker's imports; nothing runs beside an `exclusive` one.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    key: str = ""
    group: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    time_limit: float | None = None
    exclusive: bool = False


@dataclass(frozen=True)
class Started:
    """A worker has been given `task`."""

    task: Task


@dataclass(frozen=True)
class Progressed:
    """Long work inside `task` has come further."""

    task: Task
    progress: ProgressEvent


@dataclass(frozen=True)
class Outcome:
    """How `task` ended: its value when it is done, else what is known of the failure (traceback, exit code, log)."""

    task: Task
    status: Status
    value: Any = None
    error: str = ""
    wall_s: float = 0.0
    cpu_s: float | None = None


Event = Started | Progressed | Outcome


def parallel_map(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    jobs: int | None = None,
    ray_address: str | None = None,
    time_limit: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Outcomes of `function(item)` in the order of `items`, at most `jobs` at a time, each in a process of its own."""
    tasks = [
        Task(function, (item,), key=str(number), time_limit=time_limit, environment=environment or {})
        for number, item in enumerate(items)
    ]
    ended: dict[int, Outcome] = {}
    with Pool(jobs=jobs, ray_address=ray_address) as pool:
        for task in tasks:
            pool.submit(task)
        for event in pool.events():
            if isinstance(event, Outcome):
                ended[int(event.task.key)] = event
    return [ended[number] for number in range(len(tasks))]


class Pool:
    """Runs submitted tasks and yields their events; leaving the `with` block ends every worker and its children.

    `jobs` is how many tasks run at once: by default one for every two cores here, or the CPUs of the Ray cluster at
    `ray_address` (`"local"` starts one). What workers print goes to `<group>.log` in `log_dir`, or is dropped.
    """

    def __init__(self, *, jobs: int | None = None, ray_address: str | None = None, log_dir: Path | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise InvalidInput(f"jobs={jobs}: at least one task must run at a time.")
        self._backend: _Backend = _RayBackend(ray_address) if ray_address else _LocalBackend(log_dir)
        self._jobs = jobs or self._backend.default_jobs()
        self._queue: list[Task] = []
        self._idle: dict[str, _Worker] = {}
        self._running: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, task: Task) -> None:
        """Add a task; allowed while `events` is being iterated, also as the answer to an outcome."""
        self._queue.append(task)

    def close(self) -> None:
        """End every worker at once."""
        for worker in (*self._running, *self._idle.values()):
            worker.kill()
        self._running, self._idle, self._queue = [], {}, []
        self._backend.close()

    def events(self) -> Iterator[Event]:
        """What happens, as it happens, until every submitted task has ended."""
        while self._queue or self._running:
            yield from self._start_what_can_start()
            self._retire_idle_workers()
            deadlines = [worker.deadline for worker in self._running if worker.deadline is not None]
            patience = max(0.0, min(deadlines) - time.monotonic()) if deadlines else 1.0
            for worker, message in self._backend.wait(self._running, min(patience, 1.0)):
                if isinstance(message, ProgressEvent):
                    yield Progressed(worker.task, message)
                elif message is None:
                    yield self._end(worker, Status.DIED, error=worker.last_words(), reusable=False)
                else:
                    status, value, cpu_s = message
                    value, error = (value, "") if status is Status.DONE else (None, value)
                    yield self._end(worker, status, value=value, error=error, cpu_s=cpu_s)
            for worker in [w for w in self._running if w.deadline is not None and time.monotonic() >= w.deadline]:
                error = f"Not finished after its limit of {worker.task.time_limit:g} s; the worker was killed."
                yield self._end(worker, Status.TIMED_OUT, error=error, reusable=False)

    def _start_what_can_start(self) -> Iterator[Event]:
        started = []
        for task in self._queue:
            busy_groups = {worker.task.group for worker in self._running if worker.task.group}
            if len(self._running) >= self._jobs or any(worker.task.exclusive for worker in self._running):
                break
            if task.exclusive and self._running:
                # Nothing behind it starts either, or it would wait for ever.
                break
            if task.group in busy_groups:
                continue
            worker = self._idle.pop(task.group, None) if task.group else None
            worker = worker or self._backend.start(task.group or task.key, task.environment)
            worker.assign(task)
            self._running.append(worker)
            started.append(task)
            yield Started(task)
        self._queue = [task for task in self._queue if not any(task is other for other in started)]

    def _retire_idle_workers(self) -> None:
        wanted = {task.group for task in self._queue}
        for group in [group for group in self._idle if group not in wanted]:
            self._idle.pop(group).kill()

    def _end(
        self,
        worker: _Worker,
        status: Status,
        *,
        value: Any = None,
        error: str = "",
        cpu_s: float | None = None,
        reusable: bool = True,
    ) -> Outcome:
        self._running.remove(worker)
        task = worker.task
        if reusable and task.group:
            self._idle[task.group] = worker
        else:
            worker.kill()
        return Outcome(task, status, value, error, wall_s=time.monotonic() - worker.since, cpu_s=cpu_s)


# What a worker sends: progress, (status, value or traceback, CPU seconds), or None when it is gone.
Message = ProgressEvent | tuple[Status, Any, float] | None


class _Worker(ABC):
    """One process or Ray actor, and the task that it was last given."""

    task: Task
    since: float
    deadline: float | None

    def assign(self, task: Task) -> None:
        self.task, self.since = task, time.monotonic()
        self.deadline = None if task.time_limit is None else self.since + task.time_limit
        self.send(cloudpickle.dumps((task.function, task.args)))

    @abstractmethod
    def send(self, payload: bytes) -> None:
        """Start the pickled call."""

    @abstractmethod
    def kill(self) -> None:
        """End the worker and everything it started."""

    @abstractmethod
    def last_words(self) -> str:
        """What is known of a worker that is gone."""


class _Backend(Protocol):
    def default_jobs(self) -> int: ...

    def start(self, name: str, environment: Mapping[str, str]) -> Any: ...

    def wait(self, workers: Sequence[Any], seconds: float) -> Iterable[tuple[Any, Message]]: ...

    def close(self) -> None: ...


class _LocalBackend:
    def __init__(self, log_dir: Path | None) -> None:
        self._log_dir = log_dir

    def default_jobs(self) -> int:
        return max(1, (os.cpu_count() or 1) // 2)

    def start(self, name: str, environment: Mapping[str, str]) -> _ProcessWorker:
        return _ProcessWorker(name, environment, self._log_dir)

    def wait(self, workers: Sequence[_ProcessWorker], seconds: float) -> Iterable[tuple[_ProcessWorker, Message]]:
        by_connection: dict[Any, _ProcessWorker] = {worker.connection: worker for worker in workers}
        for ready in wait(list(by_connection), seconds):
            worker = by_connection[ready]
            try:
                yield worker, pickle.loads(worker.connection.recv_bytes())  # noqa: S301 - from our own child
            except (EOFError, OSError):
                yield worker, None

    def close(self) -> None:
        pass


class _ProcessWorker(_Worker):
    def __init__(self, name: str, environment: Mapping[str, str], log_dir: Path | None) -> None:
        self._name = name
        if log_dir is None:
            self._log: Any = tempfile.TemporaryFile()
        else:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._log = (log_dir / f"{name.replace('/', '-')}.log").open("ab+")
        self._log_start = self._log.seek(0, os.SEEK_END)
        self.connection, theirs = Pipe()
        paths = _search_path()
        # A session of its own: Ctrl-C reaches the parent only, and the whole group can be ended.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(paths=paths, fd=theirs.fileno())],
            env={**os.environ, **environment},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        theirs.close()

    def send(self, payload: bytes) -> None:
        try:
            self.connection.send_bytes(payload)
        except OSError:
            # It died while idle; the next wait reads the end of the pipe and reports that.
            pass

    def kill(self) -> None:
        kill_tree(self.process.pid)
        self.process.wait()
        self.connection.close()
        self._log.close()

    def last_words(self) -> str:
        code = self.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._log.seek(max(self._log_start, self._log.seek(0, os.SEEK_END) - 4000))
        tail = self._log.read().decode(errors="replace").strip()
        return f"The worker process ended by {how}." + (f" Its last output:\n{tail}" if tail else "")


def _search_path() -> list[str]:
    """Where this process finds modules, wherever another one starts; the mark of an editable install is no folder."""
    return [str(Path(path or ".").resolve()) if Path(path or ".").exists() else path for path in sys.path]


_CHILD = "import sys; sys.path[:] = {paths!r}; from core.parallel import _serve; _serve({fd})"


def _serve(descriptor: int) -> None:
    """The life of a worker process: read calls, make them, send what comes of them; end when the parent is gone."""
    connection: Connection[bytes, bytes] = Connection(descriptor)
    calls: SimpleQueue[bytes] = SimpleQueue()

    def read_calls() -> None:
        try:
            while True:
                calls.put(connection.recv_bytes())
        except (EOFError, OSError):
            kill_tree(os.getpid())

    threading.Thread(target=read_calls, daemon=True).start()
    progress.set_sink(lambda event: connection.send_bytes(pickle.dumps(event)))
    while True:
        connection.send_bytes(_call(calls.get()))


def _call(payload: bytes) -> bytes:
    before = _cpu_seconds()
    try:
        function, args = pickle.loads(payload)  # noqa: S301 - from our own parent
        return cloudpickle.dumps((Status.DONE, function(*args), _cpu_seconds() - before))
    except BaseException:
        # Also SystemExit and KeyboardInterrupt: whatever a task does, the worker reports it and goes on.
        return pickle.dumps((Status.RAISED, traceback.format_exc(), _cpu_seconds() - before))


def _cpu_seconds() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def kill_tree(pid: int) -> None:
    """Kill a process and all its descendants, also those in sessions of their own (torchrun's workers are)."""
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


class _RayBackend:
    """Workers are actors; a group is one actor. Every node needs the same tenfold installed."""

    def __init__(self, address: str) -> None:
        self._ray = require("ray", extra="ray")
        self._owned = not self._ray.is_initialized()
        if self._owned:
            try:
                self._ray.init(
                    address=None if address == "local" else address, include_dashboard=False, log_to_driver=False
                )
            except ConnectionError as error:
                raise NeedsHardware(
                    f"No Ray cluster answers at {address!r}. Start one with `ray start --head`, or say --ray local."
                ) from error

    def default_jobs(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def start(self, name: str, environment: Mapping[str, str]) -> _RayWorker:
        return _RayWorker(self._ray, environment)

    def wait(self, workers: Sequence[_RayWorker], seconds: float) -> Iterable[tuple[_RayWorker, Message]]:
        by_call = {worker.call: worker for worker in workers}
        # Progress is asked for, not sent: a short wait keeps the display alive.
        ready, pending = self._ray.wait(list(by_call), timeout=min(seconds, 0.5))
        for call in ready:
            worker = by_call[call]
            try:
                yield worker, pickle.loads(self._ray.get(call))  # noqa: S301 - from our own actor
            except self._ray.exceptions.RayError as error:
                worker.failure = str(error)
                yield worker, None
        for call in pending:
            worker = by_call[call]
            try:
                for event in self._ray.get(worker.actor.drain.remote(), timeout=1):
                    yield worker, event
            except self._ray.exceptions.RayError:
                # The call itself reports a dead actor on the next wait; a busy one has nothing to tell yet.
                continue

    def close(self) -> None:
        if self._owned:
            self._ray.shutdown()


class _RayWorker(_Worker):
    def __init__(self, ray: Any, environment: Mapping[str, str]) -> None:
        self._ray = ray
        self.failure = ""
        # Two threads: one makes the call while the other answers `drain`.
        options = {"num_cpus": 1, "max_concurrency": 2, "runtime_env": {"env_vars": dict(environment)}}
        self.actor = ray.remote(**options)(_Actor).remote(_search_path())

    def send(self, payload: bytes) -> None:
        self.call = self.actor.make_call.remote(payload)

    def kill(self) -> None:
        self._ray.kill(self.actor, no_restart=True)

    def last_words(self) -> str:
        return f"The Ray actor is gone. {self.failure}"


class _Actor:
    def __init__(self, paths: list[str]) -> None:
        sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
        self._events: SimpleQueue[ProgressEvent] = SimpleQueue()
        progress.set_sink(self._events.put)

    def make_call(self, payload: bytes) -> bytes:
        return _call(payload)

    def drain(self) -> list[ProgressEvent]:
        return [self._events.get() for _ in range(self._events.qsize())]
