"""Train a policy while rollout processes pull its weights, only what has changed, between their episodes.

The policy plays a contextual bandit with the images of scikit-learn's handwritten digits: it sees an image, names a
digit, and is rewarded if it is right. REINFORCE trains float32 weights, which are published as bfloat16, so that a
small step leaves most elements as they are. The trainer publishes a release after every update. Each rollout process
plays with the newest release, and between two episodes pulls what has changed since the one that it has. One of them is
killed, and comes back.

    python examples/rl_weights.py

Writes rl_weights.png: the bytes that were pulled, how long rollouts paused for them, and how many releases behind they
were. Needs the extras cli, examples and ray: pip install '.[cli,examples,ray]'
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import ray
import torch
from torch import nn

import tensorkv
from tensorkv.cli import demo

ROLLOUTS = 3
UPDATES = 60
KILLED_AT = 20
HIDDEN = 512
NAME = "rl-weights"
PLOT = "rl_weights.png"


def policy(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return a policy: logits of ten actions for an image."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)).to(dtype)


def train() -> int:
    """Train and publish; return 0 if every rollout process has seen only whole releases."""
    digits = demo.load_digits()
    master = policy(torch.float32)
    optimizer = torch.optim.Adam(master.parameters(), lr=1e-4)
    with tensorkv.create("dist_async", name=NAME, num_servers=2, num_workers=1) as kv:
        kv.init_tree(policy(), prefix="policy")
        rollouts = [start(number) for number in range(ROLLOUTS)]
        while kv.stats()["clients"] <= ROLLOUTS and all(each.poll() is None for each in rollouts):
            time.sleep(0.05)
        lines: list[str] = []
        for update in range(1, UPDATES + 1):
            chosen = torch.randint(len(digits.images), (256,))
            images, labels = digits.images[chosen], digits.labels[chosen]
            actions = torch.distributions.Categorical(logits=master(images))
            taken = actions.sample()
            reward = (taken == labels).float()
            optimizer.zero_grad()
            (-actions.log_prob(taken) * (reward - reward.mean())).mean().backward()
            optimizer.step()
            low = {name: value.to(torch.bfloat16) for name, value in master.state_dict().items()}
            kv.push_tree(low, prefix="policy")
            kv.publish(f"update-{update}", keep=2)
            if update == KILLED_AT:
                rollouts[0].send_signal(signal.SIGKILL)
                lines += finish(rollouts[0])
                rollouts[0] = start(0)
                print(f"rollout process 0 was killed after update {update}, and comes back")
        for each in rollouts:
            lines += finish(each)
        failed = [number for number, each in enumerate(rollouts) if each.returncode]
    pulls = [json.loads(line) for line in lines if line.startswith("{")]
    plot(pulls)
    parts = [each["nbytes"] for each in pulls if each["changes"]]
    whole = sum(value.numel() * 2 for value in master.state_dict().values())
    print(f"a whole policy has {whole} bytes, changes had {sum(parts) / max(1, len(parts)):.0f} on average")
    if failed:
        print(f"rollout processes {failed} have seen something else than a whole release")
        return 1
    print(f"all {ROLLOUTS} rollout processes saw whole releases only, up to update {UPDATES}; curves: {PLOT}")
    return 0


def start(number: int) -> subprocess.Popen[str]:
    """Start a rollout process."""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, __file__, "rollout", str(number)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this file


def finish(rollout: subprocess.Popen[str]) -> list[str]:
    """Wait for a rollout process, and return what it has printed."""
    printed, _ = rollout.communicate()
    return printed.splitlines()


def roll_out(number: int) -> int:
    """Play with each newest release until the last; return 0 if every one was whole."""
    digits = demo.load_digits()
    model, last, digest = policy(), "", None
    with tensorkv.create("dist_async", name=NAME) as kv:
        while last != f"update-{UPDATES}":
            with kv.wait_release(after=last, timeout_s=300) as release:
                start = time.perf_counter()
                if digest is None:
                    release.pull_tree(into=model, prefix="policy")
                    nbytes = sum(value.nbytes for value in model.state_dict().values())
                else:
                    changes = release.changes(since=last)
                    start = time.perf_counter()
                    tensorkv.apply_changes(model, changes, prefix="policy", base=digest)
                    nbytes = changes.nbytes
                pause = time.perf_counter() - start
                told = {"rollout": number, "changes": digest is not None, "nbytes": nbytes, "pause_s": pause}
                digest, last = release.digest, release.name
                whole = {key: release.pull(f"policy.{key}") for key in model.state_dict()}
                if not all(torch.equal(value, whole[key]) for key, value in model.state_dict().items()):
                    return 1
            with torch.no_grad():
                actions = model(digits.test_images.to(torch.bfloat16)).argmax(1)
            reward = (actions == digits.test_labels).float().mean().item()
            behind = kv.releases()[-1].number - release.number
            say(json.dumps({**told, "update": int(last.partition("-")[2]), "behind": behind, "reward": reward}))
    return 0


def plot(pulls: list[dict[str, float]]) -> None:
    """Draw bytes, pauses and staleness of every pull."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, sharex=True, figsize=(7, 9), layout="constrained")
    rows = [("nbytes", "bytes pulled"), ("pause_s", "pause, s"), ("behind", "releases behind"), ("reward", "reward")]
    for axis, (name, label) in zip(axes, rows, strict=True):
        for number in range(ROLLOUTS):
            own = [each for each in pulls if each["rollout"] == number]
            axis.plot([each["update"] for each in own], [each[name] for each in own], ".-", label=f"rollout {number}")
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[0].legend()
    axes[-1].set_xlabel("update")
    figure.savefig(PLOT)


def say(line: str) -> None:
    """Print a whole line at once, so that a kill does not cut it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(roll_out(int(sys.argv[2])) if sys.argv[1:2] == ["rollout"] else train())
