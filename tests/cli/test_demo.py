"""The demo learns, shows that many replicas are as good as one, and says where its picture is."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from tensorkv.cli import demo, main

PNG = b"\x89PNG\r\n\x1a\n"
SHORT = demo.Settings(epochs=2)


@pytest.fixture(scope="module")
def digits():
    return demo.load_digits()


def test_demo_reaches_its_accuracy_and_names_the_png_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["demo"]) == 0
    shown = capsys.readouterr()
    *_, many, one, apart, last = shown.out.splitlines()
    assert last == "curves: tensorkv-demo.png"
    assert (tmp_path / "tensorkv-demo.png").read_bytes().startswith(PNG)
    assert many.startswith("4 replicas: test accuracy 0.")
    assert one.startswith("1 replica: test accuracy 0.")
    assert float(many.split()[4].rstrip(",")) >= 0.96
    assert float(one.split()[4].rstrip(",")) >= 0.96
    assert float(apart.split()[-2]) < 1e-5
    assert "4 replicas" in shown.err
    assert "20/20" in shown.err


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(("replicas", "batch_size"), [(4, 64), (3, 50)])
def test_replicas_learn_what_one_learns_from_whole_batches(digits, optimizer, replicas, batch_size):
    settings = replace(SHORT, optimizer=optimizer, replicas=replicas, batch_size=batch_size)
    many = demo.train(digits, settings)
    one = demo.train(digits, replace(settings, replicas=1))
    assert many.losses == pytest.approx(one.losses, rel=1e-5)
    assert many.accuracies == pytest.approx(one.accuracies, abs=0.003)
    assert many.losses[1] < many.losses[0]


def test_a_batch_may_be_smaller_than_the_number_of_replicas(digits):
    few = demo.Digits(digits.images[:9], digits.labels[:9], digits.test_images, digits.test_labels)
    settings = replace(SHORT, replicas=4, batch_size=2)
    assert demo.train(few, settings).losses == pytest.approx(
        demo.train(few, replace(settings, replicas=1)).losses, rel=1e-5
    )


def test_training_depends_on_the_seed_alone(digits):
    settings = replace(SHORT, epochs=1, replicas=2)
    first = demo.train(digits, settings)
    before = torch.get_rng_state()
    torch.rand(3)
    assert demo.train(digits, settings) == first
    assert demo.train(digits, replace(settings, seed=1)) != first
    torch.set_rng_state(before)


def test_training_leaves_the_callers_random_numbers_alone(digits):
    before = torch.get_rng_state()
    demo.train(digits, replace(SHORT, epochs=1, replicas=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_digits_are_split_by_class_without_overlap(digits):
    assert (len(digits.labels), len(digits.test_labels)) == (1347, 450)
    # The images are all different but for few; a leak of whole images would be seen here.
    train, test = ({bytes(image.numpy()) for image in images} for images in (digits.images, digits.test_images))
    assert not train & test
    per_class = digits.test_labels.bincount()
    assert len(per_class) == 10
    assert int(per_class.max() - per_class.min()) <= 3
    assert digits.images.dtype is torch.float32
    assert (float(digits.images.min()), float(digits.images.max())) == (0.0, 1.0)


def test_accuracy_counts_the_test_images_named_right(digits):
    class Perfect(torch.nn.Module):
        def forward(self, images):
            wrong = torch.arange(len(images)) < 45
            return torch.nn.functional.one_hot((digits.test_labels + wrong) % 10, 10)

    assert demo.accuracy(Perfect(), digits) == pytest.approx(0.9)


def test_both_lines_of_the_picture_can_be_seen_where_they_coincide():
    curves = demo.Curves([2.0, 1.0], [0.5, 0.975])
    drawn = demo.figure(curves, replace(curves, accuracies=[0.5, 0.9]), demo.Settings())
    assert "97.5% with 4 replicas, 90.0% with 1 replica" in drawn.get_suptitle()
    for axes in drawn.axes:
        below, above = axes.get_lines()
        assert below.get_zorder() <= above.get_zorder()
        assert below.get_linewidth() > 2 * above.get_linewidth()
        assert below.get_linestyle() != above.get_linestyle()
        assert axes.get_xlabel() == "epoch"
        assert axes.get_ylabel()
        assert axes.get_title()
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "1 replica, whole batches",
            "4 replicas, gradients summed in the store",
        ]
    assert list(drawn.axes[0].get_lines()[1].get_ydata()) == [2.0, 1.0]
    assert list(drawn.axes[1].get_lines()[0].get_ydata()) == [0.5, 0.9]


def test_compressed_gradients_are_plotted_over_their_bytes(tmp_path, capsys):
    words = ["--compression", "2bit", "--epochs", "3", "--quiet", "--out", str(tmp_path / "demo.png")]
    assert main.main(["demo", *words]) == 0
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)
    settings = replace(SHORT, optimizer="sgd", compression="2bit")
    curves = demo.train(demo.load_digits(), settings)
    steps, numel = 22, sum(each.numel() for each in demo.network(0).parameters())
    # Four replicas, and at most a word more for each parameter.
    assert curves.raw_nbytes == [4 * 4 * numel * steps, 2 * 4 * 4 * numel * steps]
    assert all(0 < 16 * sent - raw < raw / 50 for sent, raw in zip(curves.sent_nbytes, curves.raw_nbytes, strict=True))
    assert curves.losses[1] < curves.losses[0]
    drawn = demo.figure(curves, demo.train(demo.load_digits(), replace(settings, compression=None)), settings)
    for axes in drawn.axes:
        plain, compressed = axes.get_lines()
        assert (plain.get_label(), compressed.get_label()) == ("no compression", "2bit")
        assert list(compressed.get_xdata()) == [each / 1e6 for each in curves.sent_nbytes]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("optimizer", "lr", "expected"), [("sgd", None, 0.2), ("sgd", 0.5, 0.5), ("nadam", None, 2e-3)]
)
def test_learning_rate_is_the_one_given_or_the_optimizers(digits, monkeypatch, optimizer, lr, expected):
    rates = []

    class Watched(demo.Trainer):
        def step(self):
            rates.append(self.learning_rate)
            super().step()

    monkeypatch.setattr(demo, "Trainer", Watched)
    demo.train(digits, replace(SHORT, optimizer=optimizer, lr=lr, replicas=1, batch_size=1347))
    assert rates == pytest.approx([expected, expected / 2])


# ---------------------------------------------------------------- the command


def run_demo(tmp_path, *options):
    out = tmp_path / "curves.png"
    return main.main(["demo", "--out", str(out), "--replicas", "2", *options]), out


def test_quiet_prints_only_the_line_with_the_png(tmp_path, capsys):
    status, out = run_demo(tmp_path, "--epochs", "1", "--quiet")
    assert status == 0
    assert capsys.readouterr() == (f"curves: {out}\n", "")
    assert out.read_bytes().startswith(PNG)


def test_options_reach_the_training(tmp_path, capsys):
    options = ["--epochs", "1", "--batch-size", "200", "--lr", "0.1", "--optimizer", "sgd", "--seed", "7"]
    status, _ = run_demo(tmp_path, *options, "--store", "device")
    assert status == 0
    expected = demo.train(
        demo.load_digits(), demo.Settings(2, epochs=1, batch_size=200, lr=0.1, optimizer="sgd", seed=7)
    )
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "1347 training images, 450 test images, 1 epoch, sgd in a store of type device"
    assert shown[1] == f"2 replicas: test accuracy {expected.accuracies[0]:.4f}, loss {expected.losses[0]:.4f}"


def test_too_low_an_accuracy_is_a_failure_that_still_shows_the_curves(tmp_path, capsys):
    status, out = run_demo(tmp_path, "--epochs", "1", "--quiet", "--min-accuracy", "1")
    shown = capsys.readouterr()
    assert status == 1
    assert shown.out == f"curves: {out}\n"
    assert shown.err.startswith("tensorkv: error: demo: the test accuracy is 0.")
    assert shown.err.endswith(", under 1\n")
    assert shown.err.count("\n") == 1
    assert out.exists()


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ([], 1),
        (["--seed", "1", "--replicas", "2", "--store", "device"], 1),
        (["--epochs", "1"], 0),
        (["--batch-size", "10"], 0),
        (["--lr", "1e-3"], 0),
        (["--optimizer", "sgd"], 0),
        (["--epochs", "1", "--min-accuracy", "0.6"], 1),
        (["--min-accuracy", "0.5"], 0),
    ],
)
def test_only_the_demos_own_training_is_held_to_its_accuracy(tmp_path, monkeypatch, options, status):
    monkeypatch.setattr(demo, "run", lambda *_, **__: demo.Curves([1.0], [0.55]))
    assert main.main(["demo", "--out", str(tmp_path / "a.png"), *options]) == status


@pytest.mark.parametrize(
    ("options", "world_size", "part"),
    [
        (["--workers", "4", "--replicas", "8"], None, "--replicas is for one process; with --workers each trains one"),
        (["--replicas", "8"], "4", "--replicas is for one process"),
        (["--workers", "2"], "4", "--workers 2, but torchrun has started 4"),
    ],
)
def test_options_that_several_workers_would_ignore_are_wrong_usage(monkeypatch, capsys, options, world_size, part):
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started workers"))
    for name, text in (("WORLD_SIZE", world_size), ("RANK", world_size and "0")):
        if text is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, text)
    assert main.main(["demo", "--store", "dist_sync", *options]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_a_number_of_workers_that_is_none_is_an_error_of_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert main.main(["demo", "--store", "dist_sync"]) == 1
    assert "WORLD_SIZE is four; expected a rank below the number of workers" in capsys.readouterr().err


def test_one_worker_trains_one_replica(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    trained = []
    monkeypatch.setattr(demo, "run", lambda settings, *_, **__: trained.append(settings) or demo.Curves([1.0], [1.0]))
    for options in (["--workers", "1"], []):
        assert main.main(["demo", "--store", "dist_sync", *options, "--out", str(tmp_path / "a.png")]) == 0
    assert [settings.replicas for settings in trained] == [1, 4]


TRAINED = ["--epochs", "2", "--batch-size", "500", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of two epochs, and its curves."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_demo(folder, *TRAINED, "--checkpoint", str(folder))[0] == 0
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "checkpoint"))


@pytest.mark.parametrize("epochs", [2, 3])
def test_training_resumes_from_a_checkpoint(tmp_path, checkpoint, epochs):
    before = json.loads((checkpoint / "curves.json").read_text())
    words = [*TRAINED, "--epochs", str(epochs), "--checkpoint", str(checkpoint)]
    assert run_demo(tmp_path, *words)[0] == 0
    after = json.loads((checkpoint / "curves.json").read_text())
    assert len(after["losses"]) == epochs
    assert after["losses"][:2] == before["losses"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--epochs", "1"], "has 2 epochs; expected at most --epochs 1"),
        (["--batch-size", "250"], "was trained with --batch-size 500; expected 250"),
        (["--optimizer", "sgd"], "was trained with --optimizer adam; expected sgd"),
        (["--lr", "0.5"], "was trained with --lr 0.005; expected 0.5"),
        (["--seed", "3"], "was trained with --seed 0; expected 3"),
        (["--replicas", "3"], "was trained with --replicas 2; expected 3"),
    ],
)
def test_a_checkpoint_of_another_training_is_not_resumed(tmp_path, capsys, checkpoint, options, part):
    before = (checkpoint / "curves.json").read_bytes()
    status, out = run_demo(tmp_path, *TRAINED, "--checkpoint", str(checkpoint), *options)
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (1, 1)
    assert f"{checkpoint}: {part}" in error
    assert not out.exists()
    assert (checkpoint / "curves.json").read_bytes() == before


@pytest.mark.parametrize(
    "written",
    ["", "{", "[]", "[[1.0, 2.0], [0.5, 0.6]]", '{"settings": {}, "losses": 3, "accuracies": []}', "[" * 100_000],
)
def test_damaged_curves_of_a_checkpoint_are_an_error_of_one_line(tmp_path, capsys, checkpoint, written):
    (checkpoint / "curves.json").write_text(written)
    status, _ = run_demo(tmp_path, *TRAINED, "--checkpoint", str(checkpoint))
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (1, 1)
    assert f"{checkpoint / 'curves.json'}: damaged" in error


def test_curves_that_lack_an_epoch_of_their_checkpoint_are_damaged(tmp_path, capsys, checkpoint):
    found = json.loads((checkpoint / "curves.json").read_text())
    (checkpoint / "curves.json").write_text(json.dumps({**found, "losses": found["losses"][:1]}))
    assert run_demo(tmp_path, *TRAINED, "--checkpoint", str(checkpoint))[0] == 1
    assert "curves.json: damaged" in capsys.readouterr().err


def test_a_training_that_blows_up_is_plotted_too(tmp_path, capsys):
    status, out = run_demo(tmp_path, "--epochs", "2", "--lr", "1e30")
    assert status == 0
    assert "loss nan" in capsys.readouterr().out
    assert out.read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["sklearn", "matplotlib"])
def test_a_missing_extra_is_named_before_the_training(tmp_path, monkeypatch, capsys, name):
    for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("trained"))
    status, out = run_demo(tmp_path)
    shown = capsys.readouterr()
    assert status == 1
    hint = "in a checkout of tensorkv: pip install '.[examples]'"
    assert shown.err == f"tensorkv: error: {name} is not installed; {hint}\n"
    assert not out.exists()


def test_training_gives_the_caller_its_threads_back(digits):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        demo.train(digits, replace(SHORT, epochs=1, replicas=1, batch_size=1347))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
