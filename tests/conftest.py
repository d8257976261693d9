"""The modules lie at the top of the repository; all tests run on the CPU, offline, with fixed seeds."""
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
