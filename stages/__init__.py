"""The work: one file a stage. This table is explicit; `pipeline.config` and `pipeline.worker` read it."""

from __future__ import annotations

from align_pipeline.pipeline.stage import Stage
from align_pipeline.stages.dpo import DPO
from align_pipeline.stages.evaluate import Evaluate
from align_pipeline.stages.feedback import Feedback
from align_pipeline.stages.kto import KTO
from align_pipeline.stages.merge import Merge
from align_pipeline.stages.ppo import PPO
from align_pipeline.stages.pretrain import Pretrain
from align_pipeline.stages.reward import Reward
from align_pipeline.stages.sample import Sample
from align_pipeline.stages.sft import SFT

STAGES: dict[str, type[Stage]] = {
    "feedback": Feedback,
    "pretrain": Pretrain,
    "sft": SFT,
    "sample": Sample,
    "reward": Reward,
    "dpo": DPO,
    "kto": KTO,
    "ppo": PPO,
    "evaluate": Evaluate,
    "merge": Merge,
}
