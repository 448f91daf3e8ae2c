"""The command line as ``python -m tensorkv``."""

from tensorkv.cli import main

raise SystemExit(main())
