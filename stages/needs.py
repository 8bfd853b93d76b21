"""What the settings of a training stage need of the machine, said before anything is trained: packages, and a GPU.

Nothing is imported: packages are looked for, devices are counted. A setting that needs neither is not mentioned here.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from align_pipeline.pipeline.stage import gpus

_OPTIMIZERS = {
    r"adamw_torch_(4|8)bit": ("torchao", "torchao"),
    r"galore_.*": ("galore_torch", "galore-torch"),
    r"apollo_.*": ("apollo_torch", "apollo-torch"),
    r"(ada)?lomo": ("lomo_optim", "lomo-optim"),
    r"grokadamw": ("grokadamw", "grokadamw"),
    r"schedule_free_.*": ("schedulefree", "schedulefree"),
    r"stable_adamw": ("optimi", "torch-optimi"),
    r"adamw_anyprecision": ("torchdistx", "git+https://github.com/pytorch/torchdistx"),
    r"adamw_torch_xla": ("torch_xla", "torch-xla"),
    r"adamw_torch_npu_fused": ("torch_npu", "torch-npu"),
    r"adamw_(bnb_)?8bit|paged_.*|ademamix.*|lion_.*|rmsprop_bnb.*": ("bitsandbytes", "'align-pipeline[qlora]'"),
}
"""Pattern of `train.optim` -> the module behind it, and what `pip install` calls it; others are PyTorch's."""


def optimizer_problems(optimizer: str) -> list[str]:
    """Return what this machine lacks for a value of `train.optim`."""
    for pattern, (module, package) in _OPTIMIZERS.items():
        if re.fullmatch(pattern, optimizer) and find_spec(module) is None:
            return [f"{optimizer} needs {module}, which is not installed; pip install {package}, or set adamw_torch"]
    return []


def quantize_problems(devices: Path = Path("/dev")) -> list[str]:
    """Return what this machine lacks for `quantize: 4bit`."""
    problems = []
    # WSL and ROCm have devices of other names, which are not counted
    if gpus(devices) == 0 and not any((devices / name).exists() for name in ("dxg", "kfd")):
        problems.append("4bit needs a CUDA GPU and there is none here; remove it, or run where there is one")
    if find_spec("bitsandbytes") is None:
        problems.append(
            "4bit needs bitsandbytes, which is not installed; pip install 'align-pipeline[qlora]', or remove it"
        )
    return problems
