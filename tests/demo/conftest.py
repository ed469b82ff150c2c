"""The forms of pretraining lie beside the script that reads them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
