"""`python -m dimr_fast …` is `dimr-fast …`."""

import sys

from dimr_fast.cli import main

sys.exit(main())
