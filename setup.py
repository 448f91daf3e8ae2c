"""The compiled parts, which tensorkv can do without: everything else is in pyproject.toml."""

from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

sources = run_path("src/tensorkv/compiled/sources.py")


class Wheel(bdist_wheel):
    """A wheel that is tagged for a platform only if it has compiled parts."""

    def run_command(self, command: str) -> None:
        """Look, after the build, which of the optional extensions there are."""
        super().run_command(command)
        if command == "build":
            built_in = self.get_finalized_command("build_ext").get_ext_fullpath
            extensions = self.distribution.ext_modules
            self.distribution.ext_modules = [each for each in extensions if Path(built_in(each.name)).exists()]
            self.root_is_pure = not self.distribution.ext_modules


setup(
    ext_modules=[
        Extension(
            f"tensorkv.compiled.{module}",
            [f"src/tensorkv/compiled/{module}.c"],
            # What the package compares with its sources before it uses a part.
            define_macros=[("SOURCES", f'"{sources["checksum"](module)}"')],
            depends=[str(path) for path in Path("src/tensorkv/compiled").glob("*.h")],
            # Each operation is rounded for itself: the bits are to be the same on every processor.
            extra_compile_args=[
                "-O3",
                "-std=c11",
                "-D_GNU_SOURCE",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
            ],
            py_limited_api=True,
            # Without a C compiler the package installs all the same; torch does the sums, and Gloo the rest.
            optional=True,
        )
        for module in sources["PARTS"]
    ],
    cmdclass={"bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
