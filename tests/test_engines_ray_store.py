"""Options of a store on parameter servers: what is out of range is refused before any Ray is started."""

import socket
import threading

import pytest

import tensorkv

pytest.importorskip("ray")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_servers": 0}, "num_servers is 0"),
        ({"num_workers": True}, "num_workers is True"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"mode": "later"}, "mode is 'later'"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore'"),
        ({"staleness": -1}, "staleness is -1"),
        ({"staleness": 2, "mode": "sync"}, "staleness is 2"),
        ({"nonfinite": "skip", "mode": "sync", "num_servers": 2}, "takes one server"),
        ({"durability": "disk"}, "needs path="),
        ({"durability": "memory", "path": "store"}, "durability is 'memory'"),
        ({"lost_after_s": 1}, "lost_after_s is 1"),
        ({"lost_after_s": float("inf")}, "lost_after_s is inf"),
        ({"lost_after_s": 10**400}, "lost_after_s is 1000"),
        ({"lost_after_s": "5"}, "lost_after_s is '5'"),
        ({"path": b"store"}, "path is b'store'"),
        ({"path": 5}, "path is 5"),
        ({"path": ""}, "path is ''"),
        ({"path": "a\0b"}, "path is"),
        ({"name": "a/b"}, "without a slash"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"address": "localhost"}, "address is 'localhost'"),
        ({"address": "ray://localhost:10001"}, "address is 'ray://localhost:10001'"),
        ({"address": 6379}, "address is 6379"),
    ],
)
def test_options_out_of_range(options, said, tmp_path, monkeypatch):
    import ray

    monkeypatch.chdir(tmp_path)
    with pytest.raises(tensorkv.ArgumentError, match=said):
        tensorkv.create("dist_async", **options)
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())


def test_where_no_cluster_answers_it_is_an_error_within_the_timeout():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        # Ray itself would try until this test's time is over.
        with pytest.raises(tensorkv.ServerLostError, match=f"no Ray cluster answers at {address}"):
            tensorkv.create("dist_async", address=address, timeout_s=0.5)


def test_a_cluster_that_starts_is_waited_for():
    from tensorkv.engines import ray_cluster

    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*late.getsockname())
        with pytest.raises(ConnectionRefusedError):
            ray_cluster._wait_to_listen(address, 0)
        listening = threading.Timer(0.3, late.listen)
        listening.start()
        ray_cluster._wait_to_listen(address, 60)
        listening.join()
