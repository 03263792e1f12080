"""The program with a verb of a few lines in place of a slow one: ``python stub_command.py WHAT [FOLDER]``."""

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
import warnings
import weakref
from pathlib import Path

from fastdeitlt import cli
from fastdeitlt.run import process


def talk(folder):
    """Use every way to the terminal, then write a file, as a run does its results."""
    from rich.console import Console

    log = logging.getLogger("stub")
    log.addHandler(logging.StreamHandler(sys.stdout))
    for _ in range(2000):
        log.error("a line of a log \udcff")
    Console().print("a table")
    print("a line", flush=True)
    warnings.warn("a warning", stacklevel=1)
    try:
        raise ValueError("shown")
    except ValueError:
        traceback.print_exc()
    (Path(folder) / "results.json").write_text("{}")


def ready():
    """Tell the test that signals may come."""
    print("ready", flush=True)


def wait(folder):
    """Slow work with nothing to save."""
    ready()
    time.sleep(60)


def native(folder):
    """Native code, which no exception of Python reaches, with something to put in order."""
    process.STOP.cleanup = lambda number: (Path(folder) / "left").write_text(str(number))
    ready()
    ctypes.CDLL(None).sleep(60)


def callback(folder):
    """A weak reference's callback, whose exceptions Python reports and drops."""

    class Short:
        pass

    def slow(reference):
        ready()
        time.sleep(60)

    kept = Short()
    reference = weakref.ref(kept, slow)
    del kept
    return reference


def loop(folder):
    """A training loop, which saves for half a second after the first signal and then ends with its code."""
    seen = []
    with process.STOP.received_by(seen.append):
        ready()
        while not seen:
            time.sleep(0.01)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            time.sleep(0.01)
    (Path(folder) / "saved").write_text(str(len(seen)))
    return process.stop_code(process.STOP.first)


def impatient(folder):
    """A training loop that takes too long to save."""
    process.PATIENCE_S = 0.0
    with process.STOP.received_by(lambda number: os.write(1, b"noted\n")):
        ready()
        time.sleep(60)


def hangup(folder):
    """A run whose terminal is closed."""
    os.kill(os.getpid(), signal.SIGHUP)


if __name__ == "__main__":
    stub = globals()[sys.argv[1]]

    def stubbed(args):
        return stub(sys.argv[-1] if args.verb == "config" else args.runs_dir) or 0

    cli.VERBS |= {"demo": stubbed, "config": stubbed}
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    sys.exit(cli.main())
