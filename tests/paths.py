"""Where the tests find their data."""

from pathlib import Path

import ouro

FIXTURES = Path(__file__).parent / "fixtures"
TINY = Path(ouro.__file__).parent / "models" / "ouro-tiny"
RANDOM = ("tiny-mha", "tiny-gqa-tied", "tiny-sharded", "tiny-one-step")
