"""Makes helper modules of this folder importable: --import-mode=importlib leaves test folders off the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
