"""Adds the toy stages to the table in every process that has this folder on its PYTHONPATH: tests only."""

from align_pipeline.stages import STAGES
from toy_stages import TOYS

STAGES.update(TOYS)
