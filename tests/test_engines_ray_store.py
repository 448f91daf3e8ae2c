"""Options of a store on parameter servers: what is out of range is refused before any Ray is started."""

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
        ({"lost_after_s": "5"}, "lost_after_s is '5'"),
        ({"name": "a/b"}, "without a slash"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_options_out_of_range(options, said, tmp_path, monkeypatch):
    import ray

    monkeypatch.chdir(tmp_path)
    with pytest.raises(tensorkv.ArgumentError, match=said):
        tensorkv.create("dist_async", **options)
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())
