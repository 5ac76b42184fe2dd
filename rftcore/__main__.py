"""`python -m rftcore`, the form that `accelerate launch -m rftcore` needs."""

import sys

from rftcore.cli import main

sys.exit(main())
