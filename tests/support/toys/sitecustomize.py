"""Adds the toy stages to the table in every process that has this folder on its PYTHONPATH: tests only."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from align_pipeline.stages import STAGES
from toy_stages import TOYS

STAGES.update(TOYS)
