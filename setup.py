"""The compiled part, which tensorkv can do without: everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "tensorkv._native",
            ["src/tensorkv/_native.c"],
            extra_compile_args=["-O3", "-std=c11"],
            py_limited_api=True,
            # Without a C compiler the package installs all the same, and torch does the sums.
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
