"""Child Pythons that start at once: forks of an interpreter in which the large libraries are loaded already.

A script with PyTorch and Lightning needs several seconds of a core before its first line, and the tests start many of
them. Here one interpreter for each process of pytest loads the libraries, and each child is a fork of it. The child
is a process of its own, which ends, is killed and is waited for as any other: it is forked twice, so that Linux makes
it a child of the process that asked for it (``PR_SET_CHILD_SUBREAPER``).

:func:`run` and :class:`Popen` are those of :mod:`subprocess`. They start a Python of the usual kind wherever the fork
would differ: on systems other than Linux, for other commands, and where the environment has other settings for the
libraries that are loaded.

A child that is itself a launcher (torchrun, a Trainer of two devices, a test network) is started with
``its_children_too=True``: it finds :class:`Popen` in the place of that of :mod:`subprocess`, and a fork of its own to
ask, made before it has a thread. A child that tests what is loaded, or without what something works, is started with
``without_this_package=True``.

The processes that :mod:`multiprocessing` spawns are forks as well, and so are its fork servers, once
:func:`serve_multiprocessing` was called, as in ``conftest.py``.

The processes of pytest-xdist are forks too (``conftest.py``), with interpreters of their own to ask: the libraries are
loaded once for all of them.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from multiprocessing import util
from types import ModuleType
from typing import Any, Final

__all__ = ["Popen", "run", "serve_multiprocessing"]

LOADED_FIRST: Final = (
    "torch",
    "torch._dynamo",  # with the first optimizer of a process
    "torch.distributed.elastic.multiprocessing.errors",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "safetensors.torch",
    "torchmetrics",  # by Lightning, with SciPy and Matplotlib; the processes that share the tests have it from here
    "aiohttp",
)
"""What a child has that is started with ``without_this_package=True``: neither this package nor Lightning."""

LOADED: Final = (
    "lightning.pytorch",
    "lightning.fabric",
    "pytorch_lightning",
    "distro_optim.cli",
    "distro_optim.client.command",
    "distro_optim.strategy.session",
    "distro_optim.strategy.psyche_lightning",
    "distro_optim.strategy.psyche_pytorch_lightning",
)
SETTINGS_OF_LIBRARIES: Final = ("OMP_", "MKL_", "OPENBLAS_", "ATEN_", "LD_", "PYTHONHASHSEED", "TORCH_")
NOT_LOADED: Final = "numba"
"""It reads its settings when it is loaded: children may have others."""
READ_LATER: Final = "TORCH_NCCL_"
"""torchrun sets these, which are read when a group is made."""
PR_SET_CHILD_SUBREAPER: Final = 36
MAX_REQUEST: Final = 1 << 20
MAX_FILES: Final = 16
"""That go with a request: standard input, output and error, and those that multiprocessing hands on."""
ABOVE_ALL_FILES: Final = 500
"""Where files wait for the numbers that they shall have, which others may have still."""


class Popen(subprocess.Popen[Any]):
    """As :class:`subprocess.Popen`; a command that starts with ``sys.executable`` becomes a fork where it can.

    Args:
        its_children_too: Pythons that the child starts are forks as well.
        without_this_package: the child has PyTorch and transformers loaded, and neither this package nor Lightning.
        runs_tests: the child uses this module itself, and has both interpreters to ask from the beginning.
    """

    def __init__(
        self,
        *args: Any,
        its_children_too: bool = False,
        without_this_package: bool = False,
        runs_tests: bool = False,
        **settings: Any,
    ) -> None:
        self._its_children_too = its_children_too
        self._without_this_package = without_this_package or runs_tests
        self._runs_tests = runs_tests
        super().__init__(*args, **settings)

    def _execute_child(self, *given: Any) -> None:
        args, executable, preexec_fn, _, pass_fds, cwd, env, _, _, shell, *pipes = given
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = pipes[:6]
        start_new_session = bool(pipes[11])
        command = _command(args)
        first = _name_of(preexec_fn)
        if executable is None and first is not None and not (pass_fds or shell) and command and _is_as_here(env):
            request = {
                **command,
                "cwd": os.fspath(cwd or os.getcwd()),
                "env": dict(os.environ if env is None else env),
                "new_session": start_new_session,
                "first": first,
                "its_children_too": self._its_children_too,
                "runs_tests": self._runs_tests,
            }
            files = [p2cread if p2cread != -1 else 0, c2pwrite if c2pwrite != -1 else 1]
            files.append(errwrite if errwrite != -1 else 2)
            self.pid = _interpreter(self._without_this_package).fork(request, files)
            self._child_created = True
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
            return
        super()._execute_child(*given)  # type: ignore[misc]


def run(
    *args: Any, capture_output: bool = False, timeout: float | None = None, check: bool = False, **settings: Any
) -> subprocess.CompletedProcess[Any]:
    """As :func:`subprocess.run`.

    Raises:
        subprocess.TimeoutExpired: the child was still at work; it is killed.
        subprocess.CalledProcessError: with ``check``, if it does not end with 0.
    """
    if capture_output:
        settings.update(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with Popen(*args, **settings) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def serve_multiprocessing() -> None:
    """From now on what this process starts with :mod:`multiprocessing` is a fork of the interpreter, where it can be.

    Such a process reads from files what it shall do, which it finds under the numbers that they have here.
    """
    theirs = util.spawnv_passfds

    def spawnv_passfds(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
        command = _command([os.fsdecode(each) for each in args])
        if command is None or "resource_tracker" in command["what"] or len(passfds) + 3 > MAX_FILES:
            return theirs(path, args, passfds)
        request = {
            **command,
            "cwd": os.getcwd(),
            "env": dict(os.environ),
            "new_session": False,
            "first": "",
            "its_children_too": False,
            "runs_tests": False,
            "numbers": list(passfds),
        }
        return _interpreter(False).fork(request, [0, 1, 2, *passfds])

    util.spawnv_passfds = spawnv_passfds


def _command(args: Any) -> dict[str, Any] | None:
    """What ``[sys.executable, ...]`` asks for, or None if it is something that only a new interpreter can do."""
    if not isinstance(args, list | tuple) or args[0] != sys.executable or not sys.platform.startswith("linux"):
        return None
    rest = [os.fspath(each) for each in args[1:]]
    options = []
    unbuffered = False
    while rest[:1] in (["-W"], ["-u"]):
        if rest[0] == "-u":
            unbuffered, rest = True, rest[1:]
        else:
            options.append(rest[1])
            rest = rest[2:]
    common = {"warnings": options, "unbuffered": unbuffered}
    kind = {"-m": "module", "-c": "code"}.get(rest[0]) if rest else None
    if kind is not None:
        return {"kind": kind, "what": rest[1], "argv": rest[2:], **common}
    if rest and not rest[0].startswith("-"):
        return {"kind": "script", "what": rest[0], "argv": rest[1:], **common}
    return None


def _name_of(function: Any) -> str | None:
    """Where a new process finds what it shall call first: ``module:name``, or ``""`` for nothing. None: nowhere."""
    if function is None:
        return ""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
    return None if module in (None, "__main__") or "<" in name or "." in name else f"{module}:{name}"


def _is_as_here(env: Any) -> bool:
    def settings(of: Any) -> dict[str, str]:
        found = {name: value for name, value in of.items() if name.startswith(SETTINGS_OF_LIBRARIES)}
        return {name: value for name, value in found.items() if not name.startswith(READ_LATER)}

    return env is None or settings(env) == settings(os.environ)


class _Interpreter:
    """The process that has loaded everything and is forked, at the other end of a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def fork(self, request: dict[str, Any], files: list[int]) -> int:
        socket.send_fds(self._socket, [json.dumps(request).encode()], files)
        answer = self._socket.recv(64)
        if not answer:
            raise OSError("the interpreter that is forked has ended")
        return int(answer)

    def close(self) -> None:
        self._socket.close()


_LIBRARIES: dict[str, ModuleType] = {}
"""Modules that were loaded before this process was forked."""

_OF_THIS_CHILD: list[_Interpreter] = []
"""In a child that was started with ``its_children_too``, what it forks. With ``runs_tests`` there are two: the first is
without this package."""


def _interpreter(without_this_package: bool) -> _Interpreter:
    if _OF_THIS_CHILD:
        return _OF_THIS_CHILD[0 if without_this_package else -1]
    return _new_interpreters()[without_this_package]


@functools.cache
def _new_interpreters() -> tuple[_Interpreter, _Interpreter]:
    """One that has loaded everything, and one without this package."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    theirs = [pair[1] for pair in pairs]
    process = subprocess.Popen(
        [sys.executable, __file__, *(str(end.fileno()) for end in theirs)],
        pass_fds=[end.fileno() for end in theirs],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    for end in theirs:
        end.close()
    everything, without = (_Interpreter(ours) for ours, _ in pairs)

    def end_both() -> None:
        everything.close()
        without.close()
        process.wait()

    atexit.register(end_both)
    return everything, without


# -- in the interpreter that is forked ---------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Forks at each request. Returns in the child, with what it shall do; does not return elsewhere."""
    while True:
        data, files, _, _ = socket.recv_fds(requests, MAX_REQUEST, MAX_FILES)
        if not data:
            os._exit(0)
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            middle = os.getpid()
            child = os.fork()
            if child == 0:
                requests.close()
                os.close(told)
                os.close(tell)
                request: dict[str, Any] = json.loads(data)
                files = _numbered(files, request.get("numbers", []))
                while os.getppid() == middle:  # what is called first may be about the parent
                    time.sleep(0.001)
                if request["new_session"]:
                    os.setsid()
                first_load: list[tuple[str, ...]] = [(), LOADED] if request["runs_tests"] else []
                for names in [()] if request["its_children_too"] else first_load:
                    _load(names)
                    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    if os.fork() == 0:
                        ours.close()
                        for each in _OF_THIS_CHILD:
                            each.close()
                        _OF_THIS_CHILD.clear()
                        for file in files:
                            os.close(file)
                        return _serve(theirs)
                    theirs.close()
                    _OF_THIS_CHILD.append(_Interpreter(ours))
                for each in _OF_THIS_CHILD:
                    atexit.register(each.close)
                if request["its_children_too"]:
                    _take_the_place_of_popen()
                if request["runs_tests"]:
                    _leave_to_pytest_what_it_has()
                _become(request, files)
                return request
            os.write(tell, b"%d" % child)
            os._exit(0)
        os.close(tell)
        os.waitpid(between, 0)  # from now on the child is one of the process that asked
        requests.send(os.read(told, 64))
        os.close(told)
        for file in files:
            os.close(file)


def _numbered(files: list[int], numbers: list[int]) -> list[int]:
    """Gives those of the files that are not standard ones these numbers, and returns the three that are."""
    above = [os.dup2(file, ABOVE_ALL_FILES + at) for at, file in enumerate(files)]
    for file in files:
        os.close(file)
    for file, number in zip(above[3:], numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    return above[:3]


def _take_the_place_of_popen() -> None:
    serve_multiprocessing()
    theirs = subprocess.Popen
    for module in list(sys.modules.values()):
        if vars(module).get("Popen") is theirs:
            vars(module)["Popen"] = Popen


def _leave_to_pytest_what_it_has() -> None:
    """anyio has a plugin for pytest, which warns that it cannot rewrite what is loaded already."""
    anyio = sys.modules.get("anyio")
    if anyio is not None:
        anyio.__doc__ = "PYTEST_DONT_REWRITE"


def _become(request: dict[str, Any], files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unbuffered = request["unbuffered"] or bool(os.environ.get("PYTHONUNBUFFERED"))
    # The three keep their numbers, and have nothing in them: this process has neither read nor written.
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, TextIOWrapper)
        stream.reconfigure(write_through=unbuffered, line_buffering=stream is sys.stderr)
    asked = [each.strip() for each in os.environ.get("PYTHONWARNINGS", "").split(",") if each.strip()]
    warnings._processoptions([*asked, *request["warnings"]])  # type: ignore[attr-defined]
    first = {"module": request["cwd"], "code": "", "script": os.path.dirname(os.path.abspath(request["what"]))}
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first[request["kind"]], *paths, *sys.path[1:]]
    sys.argv = [{"module": request["what"], "code": "-c", "script": request["what"]}[request["kind"]], *request["argv"]]
    if request["first"]:
        module, name = request["first"].split(":")
        getattr(importlib.import_module(module), name)()


def _perform(request: dict[str, Any]) -> None:
    """The child's work, in a ``__main__`` of its own."""
    if request["kind"] == "module":
        runpy.run_module(request["what"], run_name="__main__", alter_sys=True)
    elif request["kind"] == "script":
        runpy.run_path(request["what"], run_name="__main__")
    else:
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(request["what"], "<string>", "exec"), main.__dict__)


def _load(names: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            importlib.import_module(name)
    if NOT_LOADED in sys.modules:
        sys.exit(f"{NOT_LOADED} is loaded: children would not have settings of their own for it")
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("a library has started a thread: this process cannot be forked")
    gc.freeze()
    _LIBRARIES.update(sys.modules)


def _leave_libraries_alone() -> None:
    """A Python that ends takes all that is loaded apart. A fork would have to copy it first, for 0.6 s of a core.

    So the libraries that were loaded before the fork are hidden from it, and so is what their C++ has to do in the end.
    All else goes the usual way: threads are waited for, functions of :mod:`atexit` are called, and modules of the
    child's own are taken apart.
    """
    libc = ctypes.PyDLL(None)  # keeps other threads from going on in the meantime
    if hasattr(libc, "on_exit"):  # of glibc
        libc.fflush(None)
        libc.on_exit(libc._exit, None)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_LIBRARIES))
    for name in _LIBRARIES.keys() - {"sys", "builtins", "__main__"}:
        sys.modules.pop(name, None)


if __name__ == "__main__":
    atexit.register(_leave_libraries_alone)  # the first, so that it is called as the last
    sys.modules["warm_python"] = sys.modules[__name__]  # for children that use it, with what they can ask
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, and for those of the children that want it
    sys.path[0] = ""
    gc.disable()  # it would look through all the libraries while they are loaded, and find nothing
    with_everything, without = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    _load(LOADED_FIRST)
    if os.fork() == 0:
        without.close()
        with_everything.recv(1, socket.MSG_PEEK)  # nobody may ever ask: one that starts the tests' processes does not
        _load(LOADED)
        connection = with_everything
    else:
        with_everything.close()
        connection = without
    asked = _serve(connection)
    gc.enable()
    _perform(asked)
