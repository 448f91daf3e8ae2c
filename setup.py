"""The compiled parts, which tensorkv can do without: everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            f"tensorkv.{name}",
            [f"src/tensorkv/{name}.c"],
            extra_compile_args=["-O3", "-std=c11", "-D_GNU_SOURCE"],
            py_limited_api=True,
            # Without a C compiler the package installs all the same; torch does the sums, and Gloo the rest.
            optional=True,
        )
        for name in ("_native", "_shared")
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
