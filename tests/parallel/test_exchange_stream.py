"""The stream of an exchange's pushes: which stream waits for what, and how long inputs are kept."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

from benthic.parallel.exchange_stream import CudaPushStream, at_once, push_stream


class Streams:
    """Stands in for CUDA's streams and events and notes every call in order."""

    def __init__(self, monkeypatch):
        self.log, self.current, self.events = [], "computing", 0
        streams = self

        class Event:
            def __init__(self):
                streams.events += 1
                self.name = f"event {streams.events}"

            def record(self):
                streams.log.append((streams.current, "records", self.name))

            def wait(self):
                streams.log.append((streams.current, "waits for", self.name))

            def synchronize(self):
                streams.log.append(("host", "waits for", self.name))

        class Stream:
            def __init__(self, device, priority):
                assert (device.type, priority) == ("cuda", -1)

            def wait_event(self, event):
                streams.log.append(("pushing", "waits for", event.name))

        @contextlib.contextmanager
        def entered(_stream):
            streams.current = "pushing"
            yield
            streams.current = "computing"

        for name, stand_in in (("Event", Event), ("Stream", Stream), ("stream", entered)):
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def runs(self, what):
        return lambda: self.log.append((self.current, "runs", what))


@pytest.fixture
def streams(monkeypatch):
    return Streams(monkeypatch)


def kept(stream, push):
    """Start a push whose input nobody else holds."""
    rows = torch.ones(4)
    return stream(push, (rows, None)), weakref.ref(rows)


def test_a_push_runs_between_two_events_and_the_computing_stream_waits_once(streams):
    stream = push_stream(torch.device("cuda", 0))
    assert isinstance(stream, CudaPushStream)
    pushed, _ = kept(stream, streams.runs("push"))
    streams.runs("compute")()
    pushed.join()
    pushed.join()
    pushed.wait()
    assert streams.log == [
        ("computing", "records", "event 1"),
        ("pushing", "waits for", "event 1"),
        ("pushing", "runs", "push"),
        ("pushing", "records", "event 2"),
        ("computing", "runs", "compute"),
        ("computing", "waits for", "event 2"),
        ("host", "waits for", "event 2"),
    ]


def test_two_pushes_are_under_way_and_each_is_waited_for_by_itself(streams):
    stream = push_stream(torch.device("cuda", 0))
    (first, one), (second, two) = (kept(stream, streams.runs(name)) for name in ("first", "second"))
    second.join()
    assert streams.log[-1] == ("computing", "waits for", "event 4")
    assert one() is not None
    assert two() is None
    first.join()
    assert streams.log[-1] == ("computing", "waits for", "event 2")
    assert one() is None


def test_inputs_of_a_push_that_nobody_waits_for_are_kept_with_the_lane(streams):
    stream = push_stream(torch.device("cuda", 0))
    pushed, rows = kept(stream, streams.runs("push"))
    del pushed
    gc.collect()
    assert rows() is not None


def test_inputs_are_kept_when_a_push_fails_half_way(streams):
    stream = push_stream(torch.device("cuda", 0))
    rows = torch.ones(4)
    seen = weakref.ref(rows)

    def fails():
        raise RuntimeError

    with contextlib.suppress(RuntimeError):
        stream(fails, (rows,))
    del rows
    gc.collect()
    assert seen() is not None


def test_on_a_cpu_a_push_happens_at_once_and_nothing_is_kept():
    stream = push_stream(torch.device("cpu"))
    assert stream is at_once
    ran = []
    pushed, rows = kept(stream, lambda: ran.append("push"))
    assert ran == ["push"]
    assert rows() is None
    pushed.join()
    pushed.wait()
