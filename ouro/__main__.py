"""`python -m ouro` is the command `ouro`."""

import sys

from ouro.cli import main

sys.exit(main())
