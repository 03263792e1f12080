"""The data path's streams on GPUs, with torch's own context of a stream on stand-ins for streams and devices."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from fastdeitlt.data.pixels.side_stream import aside, side_stream

FIRST, OWN = torch.device("cuda", 0), torch.device("cuda", 3)


@dataclass
class Stream:
    device: torch.device
    name: str = "default"

    def synchronize(self):
        events.append(f"wait for {self.name}")


class Made:
    def record_stream(self, stream):
        events.append(f"also used on {stream.name} of {stream.device.index}")


events = []


@pytest.fixture
def a_fresh_thread(monkeypatch):
    """CUDA as a thread of the rank that has GPU 3 finds it: on GPU 0, where the rank has no context.

    Yields the devices that get one, as ``cudaSetDevice`` makes it.
    """
    contexts, current, streams = {OWN}, [FIRST], {}

    @contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted
        contexts.add(wanted)
        yield
        current[0] = before  # torch makes no context on the way back

    def set_stream(stream):
        contexts.add(stream.device)
        current[0] = stream.device
        streams[stream.device] = stream

    def current_stream(of=None):
        return streams.get(of or current[0], Stream(of or current[0]))

    monkeypatch.setattr(torch.cuda, "_get_device_index", lambda *_: current[0].index)
    for replacement in (device, set_stream, current_stream):
        monkeypatch.setattr(torch.cuda, replacement.__name__, replacement)
    events.clear()
    yield contexts
    assert current == [FIRST] and current_stream(OWN).name == "default"


def test_a_ranks_thread_makes_no_context_on_another_gpu(a_fresh_thread):
    with aside(Stream(OWN, "side")):
        assert torch.cuda.current_stream().name == "side"
    assert a_fresh_thread == {OWN}


def test_what_was_made_aside_is_done_and_kept_for_the_threads_stream(a_fresh_thread):
    with aside(Stream(OWN, "side")) as made:
        made.append(Made())
        assert not events
    assert events == ["wait for side", "also used on default of 3"]


def test_a_user_has_one_stream_for_all_epochs(monkeypatch):
    """torch keeps freed memory by stream: a new one an epoch would take it anew."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    side_stream.cache_clear()
    assert side_stream(OWN, "augment") is side_stream(OWN, "augment")
    assert side_stream(OWN, "augment") is not side_stream(OWN, "source")
    assert side_stream(torch.device("cpu"), "augment") is None
    side_stream.cache_clear()
