"""A server and its spare, as clients see them; in test_faults.py with real ones that are killed."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError

from tensorkv.engines.ps.ray import handle
from tensorkv.engines.ps.ray.handle import ServerHandle

SERVES, SPARE = ["near", "far"], None


class Played:
    """An actor that answers one word of a list after the other, the last one forever; "late" is no answer."""

    def __init__(self, name, *told):
        self.name, self.asked, self.killed = name, 0, []
        self._told = itertools.chain(told, itertools.repeat(told[-1]))
        self.place = SimpleNamespace(remote=self._ask)
        self.stop = SimpleNamespace(remote=lambda: self.killed.append("stopped"))

    def _ask(self):
        self.asked += 1
        return self.name, next(self._told)


class PlayedRay:
    """Time passes where an answer is waited for, and nowhere else."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def wait(self, refs, timeout):
        done = [ref for ref in refs if ref[1] != "late"]
        self.now += 0 if done else timeout
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref, timeout=None):
        if ref is None:
            return None
        if isinstance(ref[1], BaseException):
            raise ref[1]
        return ["host", 1, 1, "node", "stamp", ref[0], ref[1]]

    def kill(self, actor):
        actor.killed.append("killed")


@pytest.fixture(autouse=True)
def played(monkeypatch):
    ray = PlayedRay()
    monkeypatch.setattr(handle, "ray", ray)
    monkeypatch.setattr(handle, "time", ray)
    return ray


def gone():
    return ActorUnavailableError("gone", None)


def test_a_server_without_a_spare_is_asked_alone():
    actor = Played("main", SERVES)
    server = ServerHandle(actor)
    assert server.place(1)[-2:] == ["main", SERVES]
    assert not server.has_spare
    failing = ServerHandle(Played("main", ActorDiedError()))
    with pytest.raises(ActorDiedError):
        failing.place(1)


def test_the_spare_is_looked_for_by_the_stamp_that_the_server_has_told():
    spare = Played("spare", SERVES)
    find = mock.Mock(side_effect=[None, spare])
    server = ServerHandle(Played("main", SERVES, gone(), gone()), find)
    assert server.place(1)[-2] == "main"
    find.assert_not_called()
    # It is not there yet when it is looked for first.
    with pytest.raises(RayActorError):
        server.place(1)
    assert server.place(1)[-2] == "spare"
    assert server.actor is spare
    assert find.call_args_list == [mock.call("stamp")] * 2


@pytest.mark.parametrize("first", ["late", gone(), SPARE, ActorDiedError()], ids=["late", "gone", "spare", "dead"])
def test_the_one_that_serves_is_found_while_the_other_is_not_there(first):
    main = Played("main", SERVES, first)
    # Its lock is free a moment after its end.
    spare = Played("spare", SPARE, SPARE, SERVES)
    server = ServerHandle(main, lambda stamp: spare)
    server.place(1)
    assert server.place(10)[-2] == "spare"
    assert server.actor is spare
    assert spare.asked == 3


def test_the_server_is_found_again_when_its_spare_is_killed():
    main, spare = Played("main", SERVES, gone(), SPARE, SERVES), Played("spare", SERVES, "late")
    server = ServerHandle(main, lambda stamp: spare)
    server.place(1)
    assert server.place(1)[-2] == "spare"
    assert server.place(1)[-2] == "main"
    assert server.actor is main


def test_an_answer_is_waited_for_so_long_and_no_longer(played):
    server = ServerHandle(Played("main", SERVES, SPARE), lambda stamp: Played("spare", "late"))
    server.place(1)
    with pytest.raises(GetTimeoutError, match="after 7 s"):
        server.place(7)
    assert 7 <= played.now < 7.5


def test_both_that_fail_are_an_error_at_once(played):
    server = ServerHandle(Played("main", SERVES, ActorDiedError(), gone()), lambda stamp: Played("spare", gone()))
    server.place(1)
    with pytest.raises(ActorDiedError):
        server.place(7)
    assert played.now == 0


@pytest.mark.parametrize("serves", ["main", "spare"])
def test_the_one_that_does_not_serve_is_ended_first(serves):
    ended = []
    main, spare = Played("main", SERVES, gone()), Played("spare", SERVES)
    for actor in (main, spare):
        actor.killed = mock.Mock(append=lambda what, name=actor.name: ended.append((name, what)))
    server = ServerHandle(main, lambda stamp: spare)
    server.place(1)
    if serves == "spare":
        server.place(1)
    server.stop()
    other = {"main": "spare", "spare": "main"}[serves]
    assert ended == [(other, "killed"), (serves, "stopped"), (serves, "killed")]
