"""Releases: named versions that stay as they are, and what has changed between them."""

import gc
import json
import random
import uuid

import numpy as np
import pytest
import torch

import tensorkv
from tensorkv import Rows
from tensorkv.storage import checkpoint

from .values import F32

MANY_VERSIONS = 30


def full(number, *shape):
    return np.full(shape, number, np.float32)


def published(kv, name, **options):
    """Publish a release and return it."""
    kv.publish(name, **options)
    return kv.open_release(name)


class ReleaseContract:
    """Releases: named versions that stay as they are, and what has changed between them."""

    @pytest.fixture(autouse=True)
    def _releases_of_a_test(self, request):
        """Skip the tests of this class where there are no releases; after each, unpublish what it has published."""
        # Tests of the other classes of a contract come by here, too.
        if not request.function.__qualname__.startswith(f"{ReleaseContract.__name__}."):
            yield
            return
        kv = request.getfixturevalue("kv")
        if not kv.is_capable("releases"):
            saving = lambda: kv.save("folder", releases=True)  # noqa: E731
            for call in (lambda: kv.publish("a"), kv.releases, lambda: kv.open_release("a"), kv.wait_release, saving):
                with pytest.raises(tensorkv.ArgumentError, match=r"has no releases"):
                    call()
            pytest.skip("this type of store has no releases")
        # Servers may be those of other tests, and a name is used once.
        self.prefix = f"{uuid.uuid4().hex[:8]}/"
        yield
        for each in kv.releases():
            kv.unpublish(each.name)

    def at(self, name):
        """Return a name of this test alone."""
        return f"{self.prefix}{name}"

    def test_a_release_stays_as_it_is(self, kv, library):
        kv.init({"a": library.make(np.full((3, 4), 1)), "b": library.make(np.full(5, 2))})
        release = published(kv, self.at("first"))
        for number in (3, 4):
            kv.push({"a": library.make(np.full((3, 4), number)), "b": library.make(np.full(5, number))})
            assert (library.read(release.pull("a")) == 1).all()
            assert (library.read(release.pull("b")) == 2).all()
            pulled = release.pull_tree()
            assert list(pulled) == ["a", "b"]
            assert (library.read(pulled["b"]) == 2).all()
        assert release.versions == {"a": 0, "b": 0}
        assert release.keys() == ["a", "b"]
        assert repr(release) == f"Release({self.at('first')!r}, number {release.number}, 2 keys)"
        with published(kv, self.at("second")) as second:
            assert second.number > release.number
            assert second.versions == {"a": 2, "b": 2}
        kv.delete("a")
        kv.init("a", library.make(np.full(7, 9)))
        assert (library.read(release.pull("a")) == 1).all()
        release.close()

    def test_every_way_of_a_push_leaves_releases_as_they_are(self, kv):
        kv.init({"w": full(1, 2, 3), "large": full(1, 300, 300), "table": Rows([0], full(1, 1, 4), 10)})
        expected = {"w": full(1, 2, 3), "large": full(1, 300, 300)}
        held = []
        for number in range(2, 6):
            held.append(
                (published(kv, self.at(f"step-{number}")), {key: value.copy() for key, value in expected.items()})
            )
            if number == 3:
                kv.set_optimizer("sgd", lr=1.0)
            way = number % 4
            for key in expected:
                grad = np.ones_like(expected[key])
                if way == 0:
                    kv.push(key, grad)
                elif way == 1:
                    kv.push([key], [[grad, 0 * grad]])
                elif way == 2:
                    kv.pushpull(key, torch.from_numpy(grad), out=torch.empty(grad.shape))
                else:
                    kv.push(key, Rows(range(len(grad)), grad, len(grad)))
                expected[key] = grad if number < 3 else expected[key] - grad
            kv.push("table", Rows([number], full(number, 1, 4), 10))
        for number, (release, values) in enumerate(held, 2):
            for key, value in values.items():
                assert (release.pull(key) == value).all()
            rows = release.row_sparse_pull("table", row_ids=range(10))
            assert sorted(np.flatnonzero(rows.values.any(axis=1))) == [0, *range(2, number)]
            release.close()
        for key, value in expected.items():
            assert (kv.pull(key) == value).all()

    def test_names_are_used_once(self, kv):
        kv.init("w", full(0, 2))
        kv.publish(self.at("step-1"))
        with pytest.raises(
            tensorkv.ReleaseExistsError, match=r'publish..*step-1".: a release of this name was published'
        ):
            kv.publish(self.at("step-1"))
        kv.unpublish(self.at("step-1"))
        assert kv.releases() == []
        with pytest.raises(tensorkv.ReleaseExistsError):
            kv.publish(self.at("step-1"))
        for call in (kv.unpublish, kv.open_release):
            with pytest.raises(tensorkv.ReleaseNotFoundError, match=r'the release ".*step-1" was dropped'):
                call(self.at("step-1"))
            with pytest.raises(tensorkv.ReleaseNotFoundError, match=r'no release ".*step-2".*did you mean ".*step-1"'):
                call(self.at("step-2"))

    @pytest.mark.parametrize("name", ["", "x" * 256, "two\nlines", 3, None, b"x"])
    def test_invalid_names(self, kv, name):
        for call in (kv.publish, kv.unpublish, kv.open_release):
            with pytest.raises(tensorkv.ArgumentError, match=r"the name is .*expected a str of 1 to 255 printable"):
                call(name)
        assert kv.releases() == []

    @pytest.mark.parametrize("keep", [0, -1, 1.5, True, "2"])
    def test_invalid_numbers_of_releases(self, kv, keep):
        with pytest.raises(tensorkv.ArgumentError, match=r"keep is .*expected an int of at least 1"):
            kv.publish(self.at("a"), keep=keep)
        assert kv.releases() == []

    def test_only_some_keys(self, kv):
        kv.init({"net.w": full(1, 2), "net.b": full(2, 1), "step": full(3, 1)})
        with published(kv, self.at("a"), keys=["net.*"]) as release:
            assert release.keys() == ["net.w", "net.b"]
            with pytest.raises(tensorkv.KeyNotFoundError, match=r'pull."step".'):
                release.pull("step")
        with pytest.raises(tensorkv.KeyNotFoundError, match=r"matches no key"):
            kv.publish(self.at("b"), keys="other.*")
        with pytest.raises(tensorkv.KeyNotFoundError, match=r'publish."lost"'):
            kv.publish(self.at("b"), keys=["net.w", "lost"])
        assert [each.name for each in kv.releases()] == [self.at("a")]

    def test_the_newest_are_kept(self, kv):
        kv.init("w", full(0, 2))
        held = published(kv, self.at("0"))
        for number in range(1, 6):
            kv.push("w", full(number, 2))
            kv.publish(self.at(str(number)), keep=2)
        assert [each.name for each in kv.releases()] == [self.at("4"), self.at("5")]
        # A reader still has it.
        assert held.pull("w").tolist() == [0, 0]
        assert [each.number for each in kv.releases()] == [held.number + 4, held.number + 5]
        held.close()
        with pytest.raises(tensorkv.ReleaseNotFoundError, match=r'/0" was dropped; the newest are ".*4", ".*5"'):
            kv.open_release(self.at("0"))

    def test_a_closed_release_is_not_read(self, kv):
        kv.init("w", full(0, 2))
        release = published(kv, self.at("a"))
        release.close()
        for call in (
            lambda: release.pull("w"),
            lambda: release.pull_tree({"w": full(0, 2)}),
            lambda: release.row_sparse_pull("w", row_ids=[0]),
            lambda: release.changes(self.at("a")),
            lambda: release.digest,
        ):
            with pytest.raises(tensorkv.SnapshotError, match=r"^\w+: this release was closed; open it again"):
                call()
        release.close()

    def test_the_newest_release_after_another_one(self, kv):
        kv.init("w", full(0, 2))
        with pytest.raises(tensorkv.WaitTimeoutError, match=r"no release has come within 0.01 s"):
            kv.wait_release(timeout_s=0.01)
        with pytest.raises(tensorkv.ReleaseNotFoundError, match=r'no release ".*x" was published'):
            kv.wait_release(after=self.at("x"), timeout_s=0.01)
        for number in range(4):
            kv.push("w", full(number, 2))
            kv.publish(self.at(f"step-{number}"), keep=2)
        for after in (None, "", self.at("step-0"), self.at("step-2")):
            with kv.wait_release(after=after, timeout_s=60) as release:
                assert (release.name, release.pull("w").tolist()) == (self.at("step-3"), [3, 3])
        with kv.wait_release() as newest, pytest.raises(tensorkv.WaitTimeoutError, match=r'after ".*step-3"'):
            kv.wait_release(after=newest, timeout_s=0.01)
        with pytest.raises(tensorkv.ArgumentError, match=r"timeout_s is -1"):
            kv.wait_release(timeout_s=-1)
        with pytest.raises(tensorkv.ArgumentError, match=r"lease_s is 0"):
            kv.open_release(self.at("step-3"), lease_s=0)

    # ------------------------------------------------------------ changes

    def test_changes_are_what_has_changed(self, kv, library):
        start = np.arange(24).reshape(4, 6)
        kv.init({key: library.make(start) for key in ("some", "all", "none")})
        kv.publish(self.at("a"))
        some, other = start.copy(), start + 100
        some[1, 2], some[3, 5] = -7, -8
        kv.push({"some": library.make(some), "all": library.make(other), "none": library.make(start)})
        kv.init("new", library.make(np.ones(2)))
        with published(kv, self.at("b")) as release:
            changes = release.changes(since=self.at("a"))
            assert [(each.key, each.kind) for each in changes] == [
                ("some", "elements"),
                ("all", "dense"),
                ("none", "same"),
                ("new", "dense"),
            ]
            assert library.read(changes[0].indices).tolist() == [8, 23]
            assert library.read(changes[0].values).tolist() == [-7, -8]
            assert library.read(changes[1].values).tolist() == other.tolist()
            assert changes[2].indices is None
            assert changes[2].values is None
            assert (changes.base, changes.name, changes.digest) == (self.at("a"), self.at("b"), release.digest)
            patches = {name: (shape, values) for name, shape, _, values in changes.patches()}
            assert sorted(patches) == ["all", "new", "some"]
            assert patches["some"][0] == (4, 6)
            with kv.open_release(self.at("a")) as first:
                assert changes.base_digest == first.digest != release.digest
                with pytest.raises(tensorkv.ArgumentError, match=r'since=".*b" is newer than the release ".*a"'):
                    first.changes(since=self.at("b"))
                assert {each.kind for each in first.changes(since=first)} == {"same"}
            with pytest.raises(tensorkv.ReleaseNotFoundError, match=r'no release ".*x" was published'):
                release.changes(since=self.at("x"))
            with pytest.raises(tensorkv.ArgumentError, match=r"since is 3"):
                release.changes(since=3)

    def test_changes_of_values_that_jax_divides(self, kv):
        jax = pytest.importorskip("jax")
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
        start, some = full(0, 12, 4), full(0, 12, 4)
        some[1, 2] = some[3, 3] = 5
        kv.init(["some", "all"], [jax.device_put(start, where)] * 2)
        kv.publish(self.at("a"))
        kv.push(["some", "all"], [some, full(1, 12, 4)])
        with published(kv, self.at("b")) as release:
            patches = list(release.changes(since=self.at("a")).patches())
        assert [name for name, *_ in patches] == ["some", "all"]
        assert (patches[0].indices.tolist(), patches[0].values.tolist()) == ([6, 15], [5, 5])
        assert np.array_equal(patches[1].values, full(1, 12, 4))

    def test_changes_since_a_release_that_is_gone_are_all_values(self, kv):
        kv.init({"w": full(1, 3), "b": full(2, 2)})
        kv.publish(self.at("a"))
        kv.push("w", full(5, 3))
        kv.publish(self.at("b"), keep=1)
        with kv.open_release(self.at("b")) as release:
            changes = release.changes(since=self.at("a"))
        assert (changes.base, changes.base_digest) == (None, None)
        assert [each.kind for each in changes] == ["dense", "dense"]
        mine = tensorkv.apply_changes({"w": full(9, 3), "b": full(9, 2)}, changes)
        assert mine["w"].tolist() == [5, 5, 5]
        assert mine["b"].tolist() == [2, 2]

    def test_keys_that_are_deleted_or_made_again_with_another_shape(self, kv):
        kv.init({"w": full(1, 3), "gone": full(2, 2), "again": full(3, 2)})
        first = published(kv, self.at("a"))
        kv.delete(["gone", "again"])
        kv.init("again", full(4, 5))
        with published(kv, self.at("b")) as release:
            changes = release.changes(since=self.at("a"))
            kinds = sorted((each.key, each.kind) for each in changes)
            assert kinds == [("again", "deleted"), ("again", "dense"), ("gone", "deleted"), ("w", "same")]
            assert changes.base_digest == first.digest
            assert changes.digest == release.digest
        with pytest.raises(tensorkv.ArgumentError, match=r'the tree has "gone", and the release ".*b" does not'):
            tensorkv.apply_changes({"w": full(1, 3), "gone": full(2, 2), "again": full(3, 2)}, changes)
        first.close()

    def test_a_table_whose_rows_start_otherwise_has_changed(self, kv):
        digests = []
        for seed in (1, 2):
            kv.init("t", Rows([], np.zeros((0, 2), F32), 9, init="normal", seed=seed))
            with published(kv, self.at(f"seed {seed}")) as release:
                digests.append(release.digest)
                if seed == 2:
                    changes = release.changes(since=self.at("seed 1"))
                    assert sorted(each.kind for each in changes) == ["deleted", "dense"]
                    assert (changes.base_digest, changes.digest) == tuple(digests)
            kv.delete("t")
        assert digests[0] != digests[1]

    @pytest.mark.parametrize("num_rows", [10, 1 << 40])
    def test_changes_of_a_table_are_its_rows(self, kv, library, num_rows):
        kv.init("table", Rows([1, 4], library.make([[1, 2], [3, 4]]), num_rows))
        kv.publish(self.at("a"))
        kv.push("table", Rows([4, 7], library.make([[3, 5], [0, 0]]), num_rows))
        with published(kv, self.at("b")) as release:
            (change,) = release.changes(since=self.at("a"))
            assert (change.kind, library.read(change.indices).tolist()) == ("rows", [4, 7])
            assert library.read(change.values).tolist() == [[3, 5], [0, 0]]
            assert library.read(kv.row_sparse_pull("table", row_ids=[7, 1]).ids).tolist() == [1, 7]
            if library.name == "jax" and num_rows > 10:
                with pytest.raises(tensorkv.ArrayTypeError, match=r'^row_sparse_pull\("table"\): .*jax_enable_x64'):
                    kv.row_sparse_pull("table", row_ids=[num_rows - 1])
            with pytest.raises(tensorkv.ArgumentError, match=r'apply_changes."table".: the key is a sparse table'):
                tensorkv.apply_changes({"table": full(0, 10, 2)}, release.changes(since=self.at("a")))

    def test_loaded_states_of_more_rows_leave_releases_as_they_are(self, kv, tmp_path):
        few, more = (Rows(ids, full(1, len(ids), 1), num_rows=9) for ids in ([1], [1, 2]))
        kv.init("t", more)
        kv.set_optimizer("adam", lr=0.1)
        kv.push("t", more)
        kv.save_optimizer_states(tmp_path / "states")
        kv.delete("t")
        kv.init("t", few)
        kv.publish(self.at("a"))
        with published(kv, self.at("b"), keep=1) as release:
            kv.load_optimizer_states(tmp_path / "states")
            (change,) = release.changes(since=self.at("a"))
            assert (change.indices.tolist(), change.values.tolist()) == ([1], [[1]])
        kv.push("t", more)
        assert (kv.row_sparse_pull("t", row_ids=[1, 2]).values < [[1], [0]]).all()

    def test_changes_lead_from_any_release_to_any_later_one(self, kv, library):
        rng = np.random.default_rng(5)
        shapes = {"w": (31, 7), "b": (5,), "scalar": (), "empty": (0,)}
        values = {key: rng.normal(size=shape).astype(F32) for key, shape in shapes.items()}
        kv.init({key: library.make(value) for key, value in values.items()})
        copies = []
        for number in range(MANY_VERSIONS):
            kv.publish(self.at(f"{number}"))
            copies.append({key: value.copy() for key, value in values.items()})
            for key in random.Random(number).sample(list(shapes), 2):
                mask = rng.random(shapes[key]) < rng.choice([0.02, 0.6])
                values[key] = np.where(mask, rng.normal(size=shapes[key]), values[key]).astype(F32)
                kv.push(key, library.make(values[key]))
        for _ in range(20):
            old, new = sorted(rng.integers(0, MANY_VERSIONS, 2))
            mine = {key: library.make(value) for key, value in copies[old].items()}
            with kv.open_release(self.at(f"{new}")) as release:
                changes = release.changes(since=self.at(f"{old}"))
                for base in (changes.base_digest, None):
                    # The second time there is nothing to do.
                    mine = tensorkv.apply_changes(mine, changes, base=base)
                    for key, value in copies[new].items():
                        assert (library.read(mine[key]) == value).all()

    def test_changes_on_another_base_are_refused(self, kv):
        kv.init({"w": full(1, 100), "b": full(2, 4)})
        kv.publish(self.at("a"))
        kv.push("w", np.arange(100, dtype=np.float32) // 99)
        with published(kv, self.at("b")) as release:
            changes = release.changes(since=self.at("a"))
        wrong = {"w": full(1, 100), "b": full(2, 4)}
        wrong["b"][3] = 0
        with pytest.raises(tensorkv.ReleaseMismatchError, match=r'"b".: .* does not hold the release ".*a"'):
            tensorkv.apply_changes(wrong, changes)
        with pytest.raises(tensorkv.ReleaseMismatchError, match=r'the changes start from ".*a"'):
            tensorkv.apply_changes(wrong, changes, base="f" * 32)
        assert wrong["w"].tolist() == [1] * 100
        for other, error, match in [
            ({"w": full(1, 100)}, tensorkv.ArgumentError, r'the tree has no array for "b"'),
            ({"w": full(1, 100), "b": full(2, 4), "c": full(1, 1)}, tensorkv.ArgumentError, r'the tree has "c"'),
            ({"w": full(1, 10, 10), "b": full(2, 4)}, tensorkv.ValueMismatchError, r"float32 of shape \(10, 10\)"),
            ({"w": np.ones(100), "b": full(2, 4)}, tensorkv.ValueMismatchError, "the array is float64"),
            ({"w": "text", "b": full(2, 4)}, tensorkv.ArrayTypeError, r'apply_changes."w"'),
        ]:
            with pytest.raises(error, match=match):
                tensorkv.apply_changes(other, changes)
        with pytest.raises(tensorkv.ArgumentError, match=r"changes is None"):
            tensorkv.apply_changes(wrong, None)

    def test_changes_into_a_module_and_below_a_prefix(self, kv):
        torch.manual_seed(1)
        trained, read = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        kv.init_tree(trained.state_dict(), prefix="net")
        kv.init("other", full(0, 1))
        with published(kv, self.at("a")) as release:
            release.pull_tree(into=read.state_dict(), prefix="net")
        with torch.no_grad():
            trained.weight[0, 1] += 1
        kv.push_tree(trained.state_dict(), prefix="net")
        before = read.weight._version
        with published(kv, self.at("b")) as release:
            assert tensorkv.apply_changes(read, release.changes(since=self.at("a")), prefix="net") is read
        assert torch.equal(read.weight, trained.weight)
        assert torch.equal(read.bias, trained.bias)
        assert read.weight._version > before

    @pytest.mark.parametrize("knows_base", [False, True])
    def test_changes_into_modules_inside_of_a_tree(self, kv, knows_base):
        torch.manual_seed(1)

        def made():
            return {"a": torch.nn.Linear(3, 2), "b": (torch.nn.Linear(2, 2), torch.ones(2))}

        trained, read = made(), made()
        for tree in (trained, read):
            tree["b"][0].bias = tree["a"].bias
        kv.init_tree(trained, prefix="net")
        with published(kv, self.at("a")) as release:
            release.pull_tree(into=read, prefix="net")
            base = release.digest if knows_base else None
        with torch.no_grad():
            trained["a"].bias[1] += 1
            trained["b"][0].weight[0, 1] += 1
        kv.push_tree(trained, prefix="net")
        with published(kv, self.at("b")) as release:
            changes = release.changes(since=self.at("a"))
        assert tensorkv.apply_changes(read, changes, prefix="net", base=base) is read
        for mine, other in ((read["a"], trained["a"]), (read["b"][0], trained["b"][0])):
            assert torch.equal(mine.weight, other.weight)
            assert torch.equal(mine.bias, other.bias)

    def test_tied_tensors_are_written_once_and_undone_as_one(self, kv):
        model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))
        model[2].weight = model[0].weight
        first = {name: value.clone() for name, value in model.state_dict().items()}
        kv.init_tree(first, prefix="all")
        kv.init_tree(model, prefix="tied")
        with published(kv, self.at("a")) as release:
            base = release.digest
        later = {name: value.clone() for name, value in first.items()}
        for value in later.values():
            value[0, 1] += 1
        kv.push_tree(later, prefix="all")
        kv.push_tree({name: later[name] for name in ("0.weight", "1.weight")}, prefix="tied")
        with published(kv, self.at("b")) as release:
            changes = release.changes(since=self.at("a"))
        with torch.no_grad():
            model[1].weight[0, 1] += 5
        before = [each.clone() for each in model.parameters()]
        for tree in (model, model.state_dict()):
            for prefix in ("all", "tied"):
                with pytest.raises(tensorkv.ReleaseMismatchError, match=r"1.weight"):
                    tensorkv.apply_changes(tree, changes, prefix=prefix, base=base)
                assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
        with torch.no_grad():
            model[1].weight[0, 1] -= 5
            model[1].weight.copy_(first["1.weight"])
        for prefix in ("all", "tied"):
            tensorkv.apply_changes(model, changes, prefix=prefix, base=base)
            assert all(torch.equal(value, later[name]) for name, value in model.state_dict().items())

    def test_tied_tensors_of_which_one_key_has_changed_are_refused(self, kv):
        shared = np.zeros(4, F32)
        kv.init({"one": shared, "other": shared, "third": shared})
        kv.publish(self.at("a"))
        kv.push("one", np.array([0, 2, 0, 0], F32))
        with published(kv, self.at("b")) as release:
            changes = release.changes(since=self.at("a"))
        assert {each.key: each.kind for each in changes} == {"one": "elements", "other": "same", "third": "same"}
        with kv.open_release(self.at("a")) as release:
            known = release.digest
        for base in (None, known):
            tree = {"one": shared, "other": shared, "third": np.zeros(4, F32)}
            with pytest.raises(tensorkv.ArgumentError, match=r"one memory, and their changes differ"):
                tensorkv.apply_changes(tree, changes, base=base)
            assert not shared.any()

    def test_changes_into_arrays_of_any_layout(self, kv):
        start = np.arange(12, dtype=np.float32).reshape(3, 4)
        kv.init("w", start)
        kv.publish(self.at("a"))
        kv.push("w", np.where(start == 5, -1, start).astype(F32))
        with published(kv, self.at("b")) as release:
            changes = release.changes(since=self.at("a"))
        for array in (
            np.asfortranarray(start),
            np.repeat(start, 2, axis=0)[::2],
            np.ascontiguousarray(start[::-1, ::-1])[::-1, ::-1],
            start.astype(">f4"),
            torch.from_numpy(start.T.copy()).t(),
        ):
            tensorkv.apply_changes({"w": array}, changes)
            assert float(array[1, 1]) == -1
            assert float(array[2, 3]) == 11
        frozen = start.copy()
        frozen.flags.writeable = False
        with pytest.raises(tensorkv.ArrayTypeError, match=r'apply_changes."w".: is read-only'):
            tensorkv.apply_changes({"w": frozen}, changes)

    def test_equal_values_have_equal_digests(self, kv):
        with self.create() as other:
            for store in (kv, other):
                store.init({"w": full(1, 300), "b": np.arange(3)})
            other.push("w", full(2, 300))
            other.push("w", full(1, 300))
            with published(kv, self.at("a")) as mine, published(other, self.at("b")) as theirs:
                digest = mine.digest
                assert digest == theirs.digest
                assert len(digest) == 32
            kv.push("b", np.arange(1, 4))
            with published(kv, self.at("c")) as later:
                assert later.digest != digest

    def test_releases_that_are_dropped_without_close(self, kv):
        kv.init("w", full(1, 4))
        published(kv, self.at("a"))
        gc.collect()
        kv.push("w", full(2, 4))
        with kv.open_release(self.at("a")) as release:
            assert release.pull("w").tolist() == [1, 1, 1, 1]

    def test_a_checkpoint_has_releases_if_asked_for(self, kv, tmp_path):
        names = [self.at(name) for name in ("first", "part", "dropped", "last")]
        kv.init({"a": full(1, 3, 4), "b": full(2, 5), "large": full(3, 200, 300)})
        kv.init("table", Rows(np.array([4, 7]), full(1, 2, 3), 10**6))
        kv.publish(names[0])
        kv.push({"a": full(5, 3, 4), "table": Rows(np.array([4]), full(9, 1, 3), 10**6)})
        kv.publish(names[1], keys=["a", "large"])
        kv.publish(names[2])
        kv.unpublish(names[2])
        kv.delete("b")
        kv.init("b", np.arange(4))
        kv.publish(names[3])
        kv.push({"a": full(6, 3, 4), "large": full(7, 200, 300)})
        told, before = kv.releases(), {name: _read(kv, name) for name in (names[0], names[1], names[3])}
        kv.save(tmp_path / "with", releases=True)
        kv.save(tmp_path / "without")
        # None of these changes is in the checkpoint.
        later = self.at("later")
        kv.push("a", full(8, 3, 4))
        kv.publish(later)
        kv.unpublish(names[1])
        kv.delete("table")
        reader = kv.open_release(names[0])
        for turn in range(2):
            kv.load(tmp_path / "with")
            assert kv.releases() == told
            assert {name: _read(kv, name) for name in before} == before
            assert kv.pull("a")[0, 0] == 6
            assert kv.info("a").version == 2
            for name in (*names, later):
                with pytest.raises(tensorkv.ReleaseExistsError):
                    kv.publish(name)
            with kv.open_release(names[3]) as release:
                kinds = {change.key: change.kind for change in release.changes(since=names[0])}
                assert (kinds["a"], kinds["large"], kinds["table"]) == ("dense", "same", "rows")
            # They stay as they are while values change, and others come after them.
            kv.push({"a": full(turn, 3, 4), "large": full(turn, 200, 300)})
            assert {name: _read(kv, name) for name in before} == before
            kv.publish(self.at(f"after {turn}"))
            assert kv.releases()[-1].number > told[-1].number + turn
        for read in (lambda: reader.pull("a"), lambda: reader.digest, lambda: reader.changes(since=names[0])):
            with pytest.raises((tensorkv.SnapshotError, tensorkv.ReleaseNotFoundError)):
                read()
        held = kv.releases()
        kv.load(tmp_path / "without")
        assert kv.releases() == held
        assert kv.pull("a")[0, 0] == 6
        assert {name: _read(kv, name) for name in before} == before
        # Values that several releases share are in the files once, and those that have not changed nowhere else.
        body = checkpoint.read_manifest(str(tmp_path / "with"))
        assert [each["key"] for each in body["releases"]["copies"]].count("a") == 2
        assert [each["key"] for each in body["releases"]["copies"]].count("large") == 1

    def test_saved_releases_go_to_a_local_store_and_back(self, kv, tmp_path):
        kv.init({"a": full(1, 64, 1000), "b": full(2, 5)})
        kv.publish(self.at("one"))
        kv.push("a", full(3, 64, 1000))
        before, told = _read(kv, self.at("one")), kv.releases()
        kv.save(tmp_path / "here", releases=True)
        with tensorkv.create("local") as local:
            local.load(tmp_path / "here")
            assert local.releases() == told
            assert _read(local, self.at("one")) == before
            local.push("b", full(4, 5))
            local.publish(self.at("two"))
            local.save(tmp_path / "there", releases=True)
            kv.load(tmp_path / "there")
            assert kv.releases() == local.releases()
            assert all(_read(kv, each.name) == _read(local, each.name) for each in kv.releases())

    def test_releases_of_a_checkpoint_that_lie(self, kv, tmp_path):
        kv.init("a", full(1, 2))
        kv.publish(self.at("one"))
        kv.save(tmp_path / "saved", releases=True)
        told = kv.releases()
        with pytest.raises(tensorkv.ArgumentError, match="save: releases is 1"):
            kv.save(tmp_path / "saved", releases=1)
        body = checkpoint.read_manifest(str(tmp_path / "saved"))
        for change in (
            lambda saved: saved["held"][0].update(number=7),
            lambda saved: saved["held"][0].update(keys=[["a", 0]]),
            lambda saved: saved["held"][0].update(keys=[["b", None]]),
            lambda saved: saved["held"][0].update(keys=[["a", None]] * 2),
            lambda saved: saved["held"].append(saved["held"][0]),
            lambda saved: saved["numbers"].update(x=0),
            lambda saved: saved["numbers"].clear(),
            lambda saved: saved.pop("copies"),
        ):
            changed = json.loads(json.dumps(body))
            change(changed["releases"])
            checkpoint._write_manifest(tmp_path / "lies.json", changed)
            (tmp_path / "lies.json").replace(tmp_path / "saved" / "manifest.json")
            with pytest.raises(tensorkv.CheckpointError, match="saved: "):
                kv.load(tmp_path / "saved")
        assert kv.releases() == told


def _read(kv, name):
    """Return the digest of a release, its number, and keys with their versions."""
    with kv.open_release(name) as release:
        return release.digest, release.number, sorted(release.versions.items())
