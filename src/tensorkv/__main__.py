"""The command line as ``python -m tensorkv``."""

from tensorkv.cli.main import main

raise SystemExit(main())
