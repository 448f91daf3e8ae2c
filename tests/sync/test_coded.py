"""Compressed gradients between workers: the bits, what is owed when workers leave or are other ones, and errors."""

import json

import numpy as np
import pytest

from tensorkv import compression
from tests.support.amount import amount
from tests.support.hosts import CAN_MAKE, two_hosts
from tests.support.workers import run
from tests.sync.coded_programs import CODECS, OPTIMIZERS

PROGRAMS = "tests.sync.coded_programs"
RULES = ("assign", "updater", *OPTIMIZERS)
SHARED, APART = ({"shared_memory": each} for each in (True, False))
needs_hosts = pytest.mark.skipif(not CAN_MAKE, reason="network namespaces take root and iproute2")


def run_over(per_host, *args):
    with two_hosts() as hosts:
        return run(sum(per_host), PROGRAMS, *args, hosts=[hosts[0]] * per_host[0] + [hosts[1]] * per_host[1])


def check_rules(texts, rules):
    for text in texts:
        assert [line for line in text.splitlines() if line.startswith("same bits")] == [f"same bits {r}" for r in rules]


def said(texts):
    """What each worker says last, as JSON could hold it."""
    return [json.loads(text.splitlines()[-1].replace("'", '"')) for text in texts]


@pytest.mark.parametrize(("workers", "options"), [(2, SHARED), (3, APART)], ids=["one host", "apart"])
def test_all_codecs_and_rules_give_the_bits_of_what_arrives(workers, options):
    check_rules(run(workers, PROGRAMS, "agree", json.dumps(options), *RULES), RULES)


@needs_hosts
@pytest.mark.parametrize("per_host", amount([(2, 2)], [(1, 1), (2, 2), (1, 3), (3, 1)]), ids=str)
def test_hosts_with_several_workers(per_host):
    # A function, a mean, a bound of the norm, and sums that are left out.
    rules = amount(("updater", "adamw", "adam", "nadam"), RULES)
    check_rules(run_over(per_host, "agree", "{}", *rules), rules)


@needs_hosts
def test_workers_that_leave_owe_until_they_are_back():
    rules = ("assign", "sgd", "adamw", "adam")
    check_rules(run_over((1, 2), "leave", *rules), rules)


@pytest.mark.parametrize("kind", ["2bit", "powersgd"])
def test_a_checkpoint_has_what_each_worker_owes(kind, tmp_path):
    saved = said(run(2, PROGRAMS, "save", tmp_path / "saved", "adamw", kind))
    assert said(run(2, PROGRAMS, "load", tmp_path / "saved", "adamw", kind)) == saved


def test_other_workers_owe_the_same_together(tmp_path):
    run(3, PROGRAMS, "save", tmp_path / "saved", "sgd", "topk")
    found = [said(run(workers, PROGRAMS, "owe_nothing", tmp_path / "saved"))[0] for workers in (3, 2, 1)]
    for key, value in found[0].items():
        for other in found[1:]:
            np.testing.assert_allclose(other[key], value, rtol=2e-3 if key in ("half", "brain") else 1e-6, atol=1e-6)


def test_other_settings_are_named():
    for text in run(2, PROGRAMS, "refuse", "settings"):
        assert "'threshold': 1.0" in text or '"threshold": 1.0' in text, text
        assert "2.0" in text


def test_workers_that_share_memory_send_nothing():
    assert [text.splitlines()[-1] for text in run(2, PROGRAMS, "refuse", "shared")] == ["[2.0, 2.0, 2.0]"] * 2


@pytest.mark.parametrize("what", ["integers", "rows", "mixed", "nan"])
def test_what_cannot_be_compressed_is_an_error_and_changes_nothing(what):
    texts = run(2, PROGRAMS, "refuse", what)
    assert [text.splitlines()[-1] for text in texts] == ["[1.0, 0.0, 1.0] [1.0, 0.0, 0.0]"] * 2


@pytest.mark.parametrize("form", ["plain", "strided"])
def test_a_gradient_that_one_worker_cannot_compress_is_told_to_the_others(form):
    first, second = (text.splitlines() for text in run(2, PROGRAMS, "refuse_alone", form))
    assert first[0].startswith("WorkerMismatchError"), first
    assert 'rank 1: push refused: push("w"): the gradient has NaN or Inf, which bf16 cannot compress' in first[0]
    assert second[0].startswith("NonFiniteError"), second
    assert all(said[1].startswith("WorkerMismatchError") for said in (first, second)), (first, second)


def test_the_programs_try_every_codec():
    assert {each["type"] for each in CODECS} == set(compression.names()) - {"doctest"}


def test_what_was_owed_of_a_sum_that_is_left_out_still_is():
    assert [text.splitlines()[-1] for text in run(2, PROGRAMS, "leave_out")] == ["[-3.0, -4.0]"] * 2
