"""Fixtures for every test: array libraries, and a check that a test leaves no thread or descriptor behind."""

import gc
import os
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

import tensorkv
from tensorkv.testing.libraries import LIBRARIES
from tests.support.servers import ServerPool
from tests.support.until import LIMIT_S

# Programs that tests start find the modules of the tests, in whatever folder they run.
ROOT = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

# A shell that starts this process in the background has it ignore Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests that need what is not installed are skipped, also those with Hypothesis.
if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # Hypothesis looks at the clock as well: how long an example takes, and how long it takes to make one.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")

# Before JAX starts: three CPU devices, so that parts can live on devices of their own.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "3")


@pytest.fixture(params=list(LIBRARIES))
def library(request):
    if request.param == "jax":
        pytest.importorskip("jax")
    return LIBRARIES[request.param]


class KeptRay:
    """A store on parameter servers that keeps one Ray for tests that follow one another: to start one takes seconds."""

    def __init__(self):
        self.store, self.is_in_use = None, False

    def open(self):
        if self.store is None:
            self.store = tensorkv.create("dist_async", name="keeper of the tests")
        return self.store

    def close(self):
        store, self.store = self.store, None
        if store is not None:
            store.close()


kept_ray = KeptRay()


def needs_ray_store(item):
    return "ray_store" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="module")
def ray_store():
    """A store on parameter servers, with the Ray that tests of this module and of the modules beside it use."""
    pytest.importorskip("ray")
    store, kept_ray.is_in_use = kept_ray.open(), True
    yield store
    kept_ray.is_in_use = False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    # No test of another kind sees it.
    if not (kept_ray.is_in_use or needs_ray_store(item)):
        kept_ray.close()


def pytest_sessionfinish():
    kept_ray.close()


@pytest.fixture(scope="module")
def server_pool(ray_store, tmp_path_factory):
    """Servers that tests of a module use one after another."""
    with ServerPool(tmp_path_factory.mktemp("pool")) as pool:
        yield pool


@pytest.fixture
def ray_address(ray_store):
    """The variable with which another process joins the Ray of a module."""
    import ray

    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


# What a machine of CI need not have, by the reasons that tests give. Every other skip fails a run with --known-skips.
MAY_SKIP = (
    "needs a CUDA device",
    "could not import 'cupy'",
    "could not import 'accelerate'",
    "could not import 'lightning'",
    "has not been made",  # the environment of a benchmark's peer
    "take root",  # network and PID namespaces
    "takes root",
    "network namespaces cannot be made here",
    "this torch has no Muon",
)


def pytest_addoption(parser):
    parser.addoption("--known-skips", action="store_true", help="fail tests that skip for an unknown reason")
    if not find_spec("pytest_timeout"):
        parser.addini("timeout", "of pytest-timeout: without it, nothing ends a test that hangs")


def fail_unknown_skip(report, config):
    """Make a failure of a skip whose reason CI does not know."""
    if not (config.getoption("--known-skips") and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(known in reason for known in MAY_SKIP):
        report.outcome, report.longrepr = "failed", f"a skip that CI does not know: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    fail_unknown_skip(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    fail_unknown_skip(report, collector.config)
    return report


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith("tests/benchmarks/"):
            item.add_marker(pytest.mark.release)
    # Those with Ray come together, so that it is started seldom.
    items.sort(key=needs_ray_store, reverse=True)


def _descriptors():
    return set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()


@pytest.fixture(autouse=True)
def no_leaks():
    """Fail a test that leaves a thread of its own running or a file open."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    left = [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    for thread in left:
        thread.join(LIMIT_S)
    assert not [thread for thread in left if thread.is_alive()]
    if any(map(_is_file, _descriptors() - descriptors)):
        # It may belong to a cycle of objects.
        gc.collect()
        assert not list(filter(_is_file, _descriptors() - descriptors)), "files left open"


def _is_file(descriptor):
    try:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return False
    if "/ray/session_" in target and "/logs/" in target:
        # Ray keeps its logs of a process open after its shutdown.
        return False
    # Libraries open what they need on first use (shared objects, fonts, /dev/shm of OpenMP); tests open paths.
    return target.startswith("/") and not target.startswith(("/dev/", "/proc/", "/sys/", "/usr/", "/etc/", sys.prefix))
