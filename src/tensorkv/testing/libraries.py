"""Array libraries: how the contract makes and reads the arrays of each."""

import numpy as np
import torch


class NumpyLibrary:
    name = "numpy"

    def make(self, values, dtype="float32"):
        return np.array(values, dtype)

    def read(self, array):
        assert type(array) is np.ndarray
        return array.copy()


class TorchLibrary:
    name = "torch"

    def make(self, values, dtype="float32"):
        return torch.tensor(np.array(values).tolist(), dtype=getattr(torch, dtype))

    def read(self, array):
        assert type(array) is torch.Tensor
        return array.detach().numpy().copy()


class JaxLibrary:
    name = "jax"

    def make(self, values, dtype="float32"):
        import jax.numpy as jnp

        return jnp.array(values, dtype)

    def read(self, array):
        import jax

        assert isinstance(array, jax.Array)
        return np.array(array)


LIBRARIES = {"numpy": NumpyLibrary(), "torch": TorchLibrary(), "jax": JaxLibrary()}
