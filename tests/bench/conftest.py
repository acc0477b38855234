"""Makes the benchmarks importable, as `bench`, without letting the root's folders stand in for installed packages."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
