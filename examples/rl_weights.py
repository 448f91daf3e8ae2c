"""Train a policy while rollout processes pull its weights, only what has changed, between their episodes.

The policy plays a contextual bandit with the images of scikit-learn's handwritten digits: it sees an image, names a
digit, and is rewarded if it is right. REINFORCE trains float32 weights, which are published as bfloat16, so that a
small step leaves most elements as they are. The trainer publishes a release after every update. Each rollout process
plays with the newest release, and between two episodes pulls what has changed since the one that it has. One of them is
killed, and comes back.

    python examples/rl_weights.py                a small network in PyTorch
    python examples/rl_weights.py transformer    one built from a config, with the structure of Hugging Face's models
    python examples/rl_weights.py jax            a pytree of JAX

Writes rl_weights.png: the bytes that were pulled, how long rollouts paused for them, and how many releases behind they
were. Needs the extras cli, examples and ray: pip install '.[cli,examples,ray]',
and for the last one jax and optax.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import nn

import tensorkv
from tensorkv.cli import demo

ROLLOUTS = 3
UPDATES = 60
KILLED_AT = 20
# A rollout process that is further behind pulls everything.
KEPT = 5
# An update of a larger policy takes as long.
UPDATE_S = 0.1
HIDDEN = 512
NAME = "rl-weights"
PLOT = "rl_weights.png"


class Mlp:
    """A policy in PyTorch: a network of two layers over pixels.

    Args:
        trains: whether this process trains float32 weights, and makes bfloat16 ones of them.
    """

    LR = 1e-4

    def __init__(self, *, trains: bool = False) -> None:
        torch.manual_seed(0)
        self.master = self.build()
        self.optimizer = torch.optim.Adam(self.master.parameters(), lr=self.LR)
        # Without copies of the float32 weights, which a rollout process has no use for.
        self.weights: Any = copy.deepcopy(self.master).to(torch.bfloat16)
        if not trains:
            del self.master, self.optimizer

    def build(self) -> nn.Module:
        """Return a module that makes logits of ten actions from images."""
        return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))

    def improve(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Make a step of REINFORCE, and take over the new weights."""
        actions = torch.distributions.Categorical(logits=self.master(images))
        taken = actions.sample()
        reward = (taken == labels).float()
        self.optimizer.zero_grad()
        (-actions.log_prob(taken) * (reward - reward.mean())).mean().backward()
        self.optimizer.step()
        self.weights.load_state_dict(self.master.state_dict())

    def pull(self, release: tensorkv.Release) -> None:
        """Take over all weights of a release."""
        release.pull_tree(into=self.weights, prefix="policy")

    def apply(self, changes: tensorkv.Changes, base: str) -> None:
        """Take over what has changed."""
        tensorkv.apply_changes(self.weights, changes, prefix="policy", base=base)

    def arrays(self) -> dict[str, Any]:
        """Return the weights by key."""
        return {f"policy.{name}": value for name, value in self.weights.state_dict().items()}

    @torch.no_grad()
    def reward(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Play an episode; return the mean reward."""
        return (self.weights(images.to(torch.bfloat16)).argmax(1) == labels).float().mean().item()


@dataclass(frozen=True)
class Config:
    """What a transformer is built from, with the names of Hugging Face's."""

    hidden_size: int = 64
    num_attention_heads: int = 4
    num_hidden_layers: int = 2
    # 17 shades of a pixel, and ten digits.
    vocab_size: int = 27


class Attention(nn.Module):
    """Every pixel attends to every other one."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what each place has gathered from the others."""
        q, k, v = (
            each(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then a network for each place."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.self_attn = Attention(config)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next layer's input."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Embeddings of shades and of places, and layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(64, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        for embedding in (self.embed_tokens, self.embed_positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what is known of the whole image."""
        x = self.embed_tokens(tokens) + self.embed_positions.weight
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(1)


class ForDigits(nn.Module):
    """A transformer over pixels; its head is the embedding of the words that it may say, one array under two names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits of the ten digits for images whose pixels are from 0 to 1."""
        tokens = (16 * images.float()).round().long()
        return self.lm_head(self.model(tokens))[:, -10:]


class Transformer(Mlp):
    """A policy that is built from a config, and has the structure and the names of a Hugging Face model."""

    LR = 3e-4

    def build(self) -> nn.Module:
        """Return a module that makes logits of ten actions from images."""
        return ForDigits(Config())


class JaxMlp:
    """A policy in JAX: the weights are a pytree, whose arrays are replaced and not written.

    Args:
        trains: whether this process trains float32 weights, and makes bfloat16 ones of them.
    """

    LR = 1e-4

    def __init__(self, *, trains: bool = False) -> None:
        import jax
        import jax.numpy as jnp

        self._jax, self._jnp = jax, jnp
        self._key, first, second = jax.random.split(jax.random.key(0), 3)
        self._master = [
            {"weight": jax.random.normal(key, (rows, columns)) / rows**0.5, "bias": jnp.zeros(columns)}
            for key, rows, columns in ((first, 64, HIDDEN), (second, HIDDEN, 10))
        ]
        if trains:
            import optax

            self._optimizer, self._add = optax.adam(self.LR), optax.apply_updates
            self._state = self._optimizer.init(self._master)
            self._gradients = jax.jit(jax.grad(self._loss))
        self.weights: Any = self._round()

    def _round(self) -> Any:
        return self._jax.tree.map(lambda value: value.astype(self._jnp.bfloat16), self._master)

    def _logits(self, params: Any, images: Any) -> Any:
        first, second = params
        hidden = self._jax.nn.relu(images @ first["weight"] + first["bias"])
        return hidden @ second["weight"] + second["bias"]

    def _loss(self, params: Any, images: Any, taken: Any, advantage: Any) -> Any:
        logs = self._jax.nn.log_softmax(self._logits(params, images))
        return -(self._jnp.take_along_axis(logs, taken[:, None], axis=1)[:, 0] * advantage).mean()

    def improve(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Make a step of REINFORCE, and take over the new weights."""
        pixels, right = self._jnp.asarray(images.numpy()), self._jnp.asarray(labels.numpy())
        self._key, key = self._jax.random.split(self._key)
        taken = self._jax.random.categorical(key, self._logits(self._master, pixels))
        reward = (taken == right).astype(self._jnp.float32)
        gradients = self._gradients(self._master, pixels, taken, reward - reward.mean())
        steps, self._state = self._optimizer.update(gradients, self._state)
        self._master = self._add(self._master, steps)
        self.weights = self._round()

    def pull(self, release: tensorkv.Release) -> None:
        """Take over all weights of a release."""
        self.weights = release.pull_tree(self.weights, prefix="policy")

    def apply(self, changes: tensorkv.Changes, base: str) -> None:
        """Take over what has changed."""
        self.weights = tensorkv.apply_changes(self.weights, changes, prefix="policy", base=base)

    def arrays(self) -> dict[str, Any]:
        """Return the weights by key."""
        return {
            f"policy.{place}.{name}": value for place, layer in enumerate(self.weights) for name, value in layer.items()
        }

    def reward(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Play an episode; return the mean reward."""
        chosen = self._logits(self.weights, self._jnp.asarray(images.numpy(), self._jnp.bfloat16)).argmax(1)
        return float((chosen == self._jnp.asarray(labels.numpy())).mean())


POLICIES: dict[str, Any] = {"mlp": Mlp, "transformer": Transformer, "jax": JaxMlp}


def train(kind: str) -> int:
    """Train and publish; return 0 if every rollout process has seen only whole releases."""
    digits = demo.load_digits()
    policy = POLICIES[kind](trains=True)
    with tensorkv.create("dist_async", name=NAME, num_servers=2, num_workers=1) as kv:
        kv.init_tree(policy.weights, prefix="policy")
        rollouts = [start(kind, number) for number in range(ROLLOUTS)]
        while kv.stats()["clients"] <= ROLLOUTS and all(each.poll() is None for each in rollouts):
            time.sleep(0.05)
        lines: list[str] = []
        for update in range(1, UPDATES + 1):
            chosen = torch.randint(len(digits.images), (256,))
            policy.improve(digits.images[chosen], digits.labels[chosen])
            kv.push_tree(policy.weights, prefix="policy")
            kv.publish(f"update-{update}", keep=KEPT)
            time.sleep(UPDATE_S)
            if update == KILLED_AT:
                rollouts[0].send_signal(signal.SIGKILL)
                lines += finish(rollouts[0])
                rollouts[0] = start(kind, 0)
                print(f"rollout process 0 was killed after update {update}, and comes back")
        for each in rollouts:
            lines += finish(each)
        failed = [number for number, each in enumerate(rollouts) if each.returncode]
    pulls = [json.loads(line) for line in lines if line.startswith("{")]
    plot(pulls)
    parts = [each["nbytes"] for each in pulls if each["changes"]]
    whole = sum(value.nbytes for value in policy.arrays().values())
    print(f"a whole policy has {whole} bytes, changes had {sum(parts) / max(1, len(parts)):.0f} on average")
    if failed:
        print(f"rollout processes {failed} have seen something else than a whole release")
        return 1
    print(f"all {ROLLOUTS} rollout processes saw whole releases only, up to update {UPDATES}; curves: {PLOT}")
    return 0


def start(kind: str, number: int) -> subprocess.Popen[str]:
    """Start a rollout process."""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, __file__, kind, str(number)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this file


def finish(rollout: subprocess.Popen[str]) -> list[str]:
    """Wait for a rollout process, and return what it has printed."""
    printed, _ = rollout.communicate()
    return printed.splitlines()


def roll_out(kind: str, number: int) -> int:
    """Play with each newest release until the last; return 0 if every one was whole."""
    digits = demo.load_digits()
    policy, last, digest = POLICIES[kind](), "", None
    # What is compiled at the first episode is compiled now.
    policy.reward(digits.test_images, digits.test_labels)
    with tensorkv.create("dist_async", name=NAME) as kv:
        while last != f"update-{UPDATES}":
            with kv.wait_release(after=last, timeout_s=300) as release:
                start = time.perf_counter()
                if digest is None:
                    policy.pull(release)
                    nbytes = sum(value.nbytes for value in policy.arrays().values())
                else:
                    changes = release.changes(since=last)
                    start = time.perf_counter()
                    policy.apply(changes, digest)
                    nbytes = changes.nbytes
                pause = time.perf_counter() - start
                told = {"rollout": number, "changes": digest is not None, "nbytes": nbytes, "pause_s": pause}
                digest, last = release.digest, release.name
                if not all((release.pull(key) == policy.arrays()[key]).all() for key in release.versions):
                    return 1
            reward = policy.reward(digits.test_images, digits.test_labels)
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
    chosen, *rollout = sys.argv[1:] or ["mlp"]
    sys.exit(roll_out(chosen, int(rollout[0])) if rollout else train(chosen))
