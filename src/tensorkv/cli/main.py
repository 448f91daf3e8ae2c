"""The command line: ``tensorkv demo``, ``tensorkv tutorial``, ``tensorkv inspect``, ``tensorkv top``."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, TypeVar

from tensorkv import __version__, compiled, compression, engines
from tensorkv.engines.transport.rendezvous import launched
from tensorkv.errors import TensorKVError, install_hint, suggestion
from tensorkv.runtime import early
from tensorkv.shard import optimizers

from . import demo, demo_servers, inspect, top, tutorial

N = TypeVar("N", int, float)

FAILURE = 1
USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PIPE_CLOSED = 141  # 128 + SIGPIPE

# The demo's default settings reach more than this; with other settings, any accuracy is accepted.
MIN_ACCURACY = 0.96
MIN_ACCURACY_ON_SERVERS = 0.95
# One that remembers gradients would take those that come late for new ones.
_COMPRESSED_OPTIMIZER = "sgd"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C, or 141 if the reader of the output has closed it. If a
    worker failed, it is that worker's: 128 + n after signal n.

    Args:
        argv: the arguments; None takes those of the process.
    """
    try:
        early.raise_at_interrupt()
        if sys.stdout is None:
            return _fail("standard output is closed")
        if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
            # Print names that the terminal's encoding lacks, instead of failing.
            sys.stdout.reconfigure(errors="backslashreplace")
        status = _run(argv)
        _flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return PIPE_CLOSED
    except (TensorKVError, OSError) as error:
        return _fail(str(error))


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        raise OSError(f"standard output: {error.strerror}") from error


def _run(argv: Sequence[str] | None) -> int:
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        arguments = _parser().parse_args(words, argparse.Namespace(words=words))
    except SystemExit as stop:  # argparse, after a usage error, --help or --version
        return stop.code if isinstance(stop.code, int) else 0
    try:
        return int(arguments.run(arguments))
    except ModuleNotFoundError as error:
        if arguments.extra is None:
            raise
        missing = (error.name or str(error)).partition(".")[0]
        return _fail(f"{missing} is not installed; {install_hint(arguments.extra)}")


def _fail(message: str, status: int = FAILURE) -> int:
    if sys.stderr is not None:
        # In one write, since several workers may write at the same time.
        sys.stderr.write(f"tensorkv: error: {' '.join(message.split())}\n")
    return status


def _discard_stdout() -> None:
    # Otherwise the interpreter flushes into the closed pipe at exit, and prints an error.
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


# ---------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(f"{message} (see: {self.prog} --help)", USAGE))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tensorkv",
        description="A key-value store for tensors: push sums arrays and updates values, pull copies them.",
        epilog="Each command has a --help of its own, with examples.\n"
        "Exit status: 0, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C, 141 after a closed pipe;\n"
        "if a worker failed, that worker's, which is 128 + n after signal n.",
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.set_defaults(run=partial(_help, parser), extra=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands)
    _add_tutorial(commands)
    _add_inspect(commands)
    _add_top(commands)
    return parser


def _version() -> str:
    what = compiled.describe()
    return f"tensorkv {__version__}" + (f" ({what})" if what else "")


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a network on handwritten digits with several replicas, and plot it",
        description="Train a small network on handwritten digits, data-parallel: every replica pushes the\n"
        "gradient of its share of a batch, the store sums them and steps the optimizer, and every\n"
        "replica pulls the new weights. Then train once more with one replica on whole batches, and\n"
        "plot both: the curves coincide. Takes some seconds; the digits come with scikit-learn.\n\n"
        "With a store of type dist_async the weights are on parameter servers, and one worker is slow:\n"
        "the plot shows accuracy against time in lock step, with bounded staleness, and without a bound.",
        epilog="examples:\n"
        "  tensorkv demo\n"
        "  tensorkv demo --replicas 8 --store device --out eight.png\n"
        "  tensorkv demo --store dist_sync --workers 4\n"
        "  tensorkv demo --store dist_async --workers 4 --staleness 2\n"
        "  tensorkv demo --store dist_sync --workers 4 --compression 2bit\n"
        "  torchrun --nproc-per-node=4 -m tensorkv demo --store dist_sync\n"
        "  tensorkv demo --optimizer sgd --lr 0.1 --epochs 40 --min-accuracy 0.95\n\n"
        f"The last line of the output names the PNG. Needs the extra examples; {install_hint('examples')}",
    )
    for name, metavar, kind, default, text in _demo_options():
        parser.add_argument(name, metavar=metavar, type=kind, default=default, help=text)
    parser.add_argument("--mode", choices=["sync", "async"], help="with dist_async: train in this mode only")
    parser.add_argument("--quiet", action="store_true", help="print only the line that names the PNG")
    parser.set_defaults(run=_demo, extra="examples")


def _demo_options() -> list[tuple[str, str, Callable[[str], Any], Any, str]]:
    """Return name, metavar, type, default and help of each option."""
    own = demo.Settings()
    rates = ", ".join(f"{lr} for {name}" for name, lr in demo.LEARNING_RATES.items())
    workers = "with dist_sync or dist_async: start N processes with torchrun, each training one replica (dist_async: 4)"
    staleness = (
        "with dist_async: rounds that a worker may be ahead of the slowest (default: 2, or no bound with --mode async)"
    )
    codecs = f"compress gradients, and plot over the bytes sent: one of {', '.join(compression.names())}"
    accuracy = (
        "exit with status 1 if the test accuracy, from 0 to 1, is lower (default: "
        f"{MIN_ACCURACY}, dist_async {MIN_ACCURACY_ON_SERVERS}, or 0 where --epochs, --batch-size, --lr, --optimizer "
        "or --compression is given)"
    )
    return [
        ("--replicas", "N", _positive, None, f"copies of the network, in one process ({own.replicas})"),
        ("--epochs", "N", _positive, own.epochs, "passes over the training images (%(default)s)"),
        ("--batch-size", "N", _positive, own.batch_size, "images in a batch, over all replicas (%(default)s)"),
        (
            "--lr",
            "RATE",
            _rate,
            None,
            f"initial learning rate, falling to 0 (default: {rates}, else torch.optim's own)",
        ),
        (
            "--optimizer",
            "NAME",
            _optimizer_name,
            None,
            f"optimizer in the store, from torch.optim ({own.optimizer}; with --compression: {_COMPRESSED_OPTIMIZER})",
        ),
        ("--seed", "N", _seed, own.seed, "for the initial weights and for shuffling (%(default)s)"),
        ("--store", "TYPE", _store_type, own.store, "type of the store (%(default)s)"),
        ("--workers", "N", _positive, None, workers),
        ("--servers", "N", _positive, None, "with dist_async: number of servers that hold the weights (1)"),
        ("--staleness", "N", _seed, None, staleness),
        ("--compression", "TYPE", _codec_name, None, codecs),
        ("--checkpoint", "DIR", _folder, None, "save after every epoch, and resume if DIR has a checkpoint"),
        ("--out", "PATH", Path, Path("tensorkv-demo.png"), "PNG to write, replacing an older one (%(default)s)"),
        ("--min-accuracy", "SHARE", _share, None, accuracy),
    ]


def _add_tutorial(commands: Any) -> None:
    parser = commands.add_parser(
        "tutorial",
        help="show the store's verbs step by step, with results",
        description="Run the store's verbs step by step and print each statement with its result:\n"
        "init, push, push from several devices, an updater, pull to several devices, lists of keys.\n"
        "The statements and results are the same for every array library.",
        epilog="examples:\n"
        "  tensorkv tutorial\n"
        "  tensorkv tutorial --arrays jax\n\n"
        f"JAX is shown with four CPU devices, and needs the extra jax; {install_hint('jax')}",
    )
    parser.add_argument(
        "--arrays",
        choices=list(tutorial.MODULES),
        default="numpy",
        help="the library whose arrays are pushed and pulled (default: %(default)s)",
    )
    parser.set_defaults(run=_tutorial, extra="jax")


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="list the contents of a checkpoint or of a store's folder",
        description="List the keys of a checkpoint, or of a store that is kept in a folder (path=), with kind,\n"
        "shape, dtype, version and size, its update rule and its files. Of a checkpoint only the manifest's\n"
        "digest is checked, unless --verify is given. Nothing is changed.",
        epilog="examples:\n"
        "  tensorkv inspect runs/checkpoint\n"
        "  tensorkv inspect --verify runs/checkpoint\n"
        "  tensorkv inspect --json runs/checkpoint | jq '.keys[].key'",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a directory that KVStore.save wrote, or the path of a store"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts (sizes in bytes)")
    parser.add_argument("--verify", action="store_true", help="read all data and check every digest")
    parser.set_defaults(run=_inspect, extra=None)


def _add_top(commands: Any) -> None:
    parser = commands.add_parser(
        "top",
        help="watch a running store of type dist_async",
        description="Show a store on parameter servers while it runs: its servers and workers, keys and bytes,\n"
        "pushes and pulls per second, how far apart workers are, waits, and the size of its log.\n"
        "The store is not disturbed. Ends when the store ends, or with Ctrl-C.",
        epilog="examples:\n"
        "  tensorkv top\n"
        "  tensorkv top --name embeddings --every 5\n"
        "  tensorkv top --once --json | jq '.workers[] | select(.state == \"dead\").rank'\n\n"
        "Rates count requests at servers: a push to two servers counts at each.\n"
        f"Needs the extra ray; {install_hint('ray')}",
    )
    add = parser.add_argument
    add("--name", default="tensorkv", metavar="NAME", help="name of the store (%(default)s)")
    add(
        "--address",
        metavar="HOST:PORT",
        help="address of its Ray cluster (default: RAY_ADDRESS, else the cluster on this machine that has the store)",
    )
    add("--every", type=_interval, default=1.0, metavar="SECONDS", help="interval between two reports (%(default)s)")
    add("--once", action="store_true", help="print one report, after one interval")
    add("--json", action="store_true", help="print each report as a line of JSON, for scripts")
    parser.set_defaults(run=_top, extra="ray")


def _folder(text: str) -> Path:
    return Path(text).absolute()


def _positive(text: str) -> int:
    return _number(text, int, lambda number: number >= 1, "a whole number from 1")


def _rate(text: str) -> float:
    return _number(text, float, lambda number: 0 < number < math.inf, "a number above 0")


def _interval(text: str) -> float:
    return _number(text, float, lambda number: 0 < number <= 86400, "a number of seconds above 0, at most 86400")


def _seed(text: str) -> int:
    return _number(text, int, lambda number: 0 <= number < 1 << 63, "a whole number from 0")


def _share(text: str) -> float:
    return _number(text, float, lambda number: 0 <= number <= 1, "a number from 0 to 1")


def _number(text: str, kind: Callable[[str], N], holds: Callable[[N], bool], expected: str) -> N:
    with suppress(ValueError):
        number = kind(text)
        if holds(number):
            return number
    raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")


def _store_type(text: str) -> str:
    return _name("store type", text, engines.names())


def _optimizer_name(text: str) -> str:
    return _name("optimizer", text, list(optimizers.CLASSES))


def _codec_name(text: str) -> str:
    return _name("codec", text, compression.names())


def _name(what: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        near = suggestion(text, known)
        raise argparse.ArgumentTypeError(f"no {what} {text!r}{near}; there are {', '.join(known)}")
    return text


# ---------------------------------------------------------------- commands


def _help(parser: argparse.ArgumentParser, _: argparse.Namespace) -> int:
    parser.print_help()
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    on_servers = "async" in arguments.store
    problem = _demo_problem(arguments, on_servers)
    if problem is not None:
        return _fail(f"demo: {problem}", USAGE)
    names = ("replicas", "epochs", "batch_size", "lr", "seed", "store", "checkpoint", "compression")
    if arguments.replicas is None:
        # Each worker trains one.
        arguments.replicas = demo.Settings.replicas if arguments.workers is None else 1
    settings = demo.Settings(**{name: getattr(arguments, name) for name in names})
    own = settings.optimizer if arguments.compression is None else _COMPRESSED_OPTIMIZER
    settings = replace(settings, optimizer=arguments.optimizer or own)
    out: Path = arguments.out
    # Before torchrun starts workers: it would report the error of each, and one of its own.
    _check_out(out)
    _check_checkpoint(settings.checkpoint)
    for module, extra in (("sklearn", "examples"), ("matplotlib", "examples"), ("ray", "ray" if on_servers else "")):
        if extra and find_spec(module) is None:
            return _fail(f"{module} is not installed; {install_hint(extra)}")
    workers = arguments.workers or (4 if on_servers else None)
    if workers is not None and "RANK" not in os.environ:
        return _launch(workers, arguments.words)
    if on_servers:
        chosen = {name: getattr(arguments, name) for name in ("mode", "staleness", "quiet")}
        reached = demo_servers.run(settings, out, servers=arguments.servers or 1, **chosen)
    else:
        reached = demo.run(settings, out, quiet=arguments.quiet).accuracies[-1]
    wanted = _wanted_accuracy(arguments.min_accuracy, settings, MIN_ACCURACY_ON_SERVERS if on_servers else MIN_ACCURACY)
    if reached < wanted:
        sys.stdout.flush()
        return _fail(f"demo: the test accuracy is {reached:.4f}, under {wanted:g}")
    return 0


def _check_out(out: Path) -> None:
    """Raise OSError if the PNG cannot be written."""
    if out.is_dir():
        raise IsADirectoryError(f"--out {out}: is a directory; name a file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: the directory {out.parent} does not exist")
    place = out if out.exists() else out.parent
    if not os.access(place, os.W_OK):
        raise PermissionError(f"--out {out}: {place} cannot be written")


def _check_checkpoint(folder: Path | None) -> None:
    """Raise OSError if a folder for checkpoints cannot be made or written."""
    if folder is None:
        return
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"--checkpoint {folder}: {place} is a file; name a directory")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"--checkpoint {folder}: {place} cannot be written")


# torchrun without its traceback for a failed worker, since the worker has already printed why it failed.
_LAUNCHER = """
import logging, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # until torchrun has imported torch and handles it
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
try:
    run.main()
except ChildFailedError as error:
    status = error.get_first_failure()[1].exitcode
    sys.exit(status if status > 0 else 128 - status)
except SignalException as error:
    sys.exit(128 + error.sigval)
"""


def _launch(workers: int, words: Sequence[str]) -> int:
    """Have torchrun run this command in several processes on this machine."""
    launcher = [sys.executable, "-c", _LAUNCHER, "--standalone", f"--nproc-per-node={workers}"]
    # torchrun does not remove its folder of logs.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # torchrun's default, which it would warn about
    with TemporaryDirectory() as logs:
        command = [*launcher, f"--log-dir={logs}", "-m", "tensorkv", *words]
        status = subprocess.run(command, env=environment, check=False).returncode  # noqa: S603 - our own words
    return status if status >= 0 else 128 - status


def _demo_problem(arguments: argparse.Namespace, on_servers: bool) -> str | None:
    """Return what is wrong with the combination of options; None if nothing is."""
    is_dist = arguments.store.startswith("dist")
    if arguments.workers is not None and not is_dist:
        return f"--workers is for stores of type dist_sync or dist_async, not {arguments.store}"
    started = launched(strict=arguments.workers is None and not on_servers)[1] if is_dist else 1
    if arguments.workers is not None and "RANK" in os.environ and arguments.workers != started:
        return f"--workers {arguments.workers}, but torchrun has started {started}; leave it out"
    if arguments.replicas is not None and is_dist and (on_servers or arguments.workers is not None or started > 1):
        return "--replicas is for one process; with --workers each trains one"
    for name in ("servers", "mode", "staleness"):
        if getattr(arguments, name) is not None and not on_servers:
            return f"--{name} is for stores of type dist_async, not {arguments.store}"
    if on_servers and arguments.checkpoint is not None:
        return "--checkpoint is for stores without servers"
    if arguments.compression is not None and (on_servers or arguments.checkpoint is not None):
        return "--compression is for stores without servers, and cannot be resumed from a --checkpoint"
    if arguments.mode == "sync" and arguments.staleness is not None:
        return "--staleness is for --mode async"
    return None


def _wanted_accuracy(given: float | None, settings: demo.Settings, own: float) -> float:
    if given is not None:
        return given
    names = ("epochs", "batch_size", "optimizer", "lr", "compression")
    is_own = all(getattr(settings, name) == getattr(demo.Settings(), name) for name in names)
    return own if is_own else 0.0


def _tutorial(arguments: argparse.Namespace) -> int:
    tutorial.run(arguments.arrays)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    report = inspect.describe(arguments.checkpoint, verify=arguments.verify)
    if arguments.json:
        print(json.dumps(report, indent=1))
        return 0
    rows = inspect.table(report)
    print("\n".join(inspect.summary(report)))
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(inspect.rich_table(rows))
    else:
        print("\n".join(["", *inspect.plain(rows)]))
    return 0


def _top(arguments: argparse.Namespace) -> int:
    top.run(arguments.name, arguments.address, arguments.every, once=arguments.once, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
