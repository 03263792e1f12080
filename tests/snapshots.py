"""A run's folder at named moments, as ``kill -9`` would leave it, taken while the run goes on to its end."""

import shutil
import threading

import pytest

from fastdeitlt.core.engine.plain import PlainEngine
from fastdeitlt.reporting import report
from fastdeitlt.run import selection
from fastdeitlt.run.checkpoints import Checkpoints
from fastdeitlt.run.selection import Selector
from fastdeitlt.run.state import State
from fastdeitlt.train import train

EVALUATION = (
    "before the last step is saved",
    "before its evaluation",
    "half evaluated",
    "evaluated, not saved",
    "saved, without its best",
    "saved with its best",
)
"""Moments at the end of an epoch whose last step is saved before it is evaluated."""
END = ("trained", "tested", "results written")
"""Moments after the last checkpoint; the last one of students alone."""


class Killed(BaseException):
    """Stands for kill -9: no handler of the program runs its clean-up on it."""


def train_until_killed(cfg, step):
    """Train on this rank; the start of its ``step``-th optimizer step kills the run."""
    real, count = PlainEngine.step, [0]

    def dying(self, rate):
        count[0] += 1
        if count[0] == step:
            raise Killed
        return real(self, rate)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PlainEngine, "step", dying)
        train(cfg)


class Snapshots:
    """Copies of the folder ``run`` in ``to``, each under the name of its moment."""

    def __init__(self, monkeypatch, run, to):
        self.monkeypatch, self.run, self.to = monkeypatch, run, to

    def before(self, moment, owner, attribute, when=lambda *_: True):
        """Copy before the first call of a function for whose arguments ``when`` holds."""
        real = getattr(owner, attribute)

        def hooked(*arguments, **named):
            if when(*arguments) and not (self.to / moment).exists():
                for thread in threading.enumerate():
                    if thread.name == "checkpoint" and thread is not threading.current_thread():
                        thread.join()
                shutil.copytree(self.run, self.to / moment, symlinks=True)
            return real(*arguments, **named)

        self.monkeypatch.setattr(owner, attribute, hooked)

    def take(self, step):
        """Copy at all moments of ``EVALUATION`` around the epoch that ``step`` ends, and at those of ``END``."""

        def is_best(best):
            return bool(best) and best["step"] == step

        first, second, third, fourth, fifth, sixth = EVALUATION
        self.before(first, State, "save", lambda state, *_: state.step == step)
        self.before(second, Selector, "evaluate", lambda _, at, *__: at == step)
        self.before(third, Selector, "_choose", lambda _, at, *__: at == step)
        self.before(fourth, State, "save", lambda state, *_: state.step == step and state.begun == 0)
        self.before(fifth, Checkpoints, "_write_best", lambda _, __, manifest: is_best(manifest["best"]))
        self.before(sixth, Checkpoints, "_link_last", lambda found, _: is_best(found._best))
        self.before(END[0], Selector, "finish")
        self.before(END[1], selection, "write_atomically")
        self.before(END[2], report, "write_report")
