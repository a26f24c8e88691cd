"""``python -m segue``: the same as the ``segue`` command."""

from __future__ import annotations

import sys

from segue.cli.main import main

sys.exit(main())
