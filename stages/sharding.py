"""A model dealt to processes (FSDP2, Zhao et al. 2023): each holds a share of every weight, gradient and moment.

Weights are put together layer by layer while a layer needs them. Checkpoints hold whole tensors in one process's form,
so that a run may go on with another number of processes, or without sharding. Left out: loading a model that no single
device can hold; it is loaded whole by each process, then cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def shard(model: Any, device: torch.device) -> None:
    """Cut a model's weights into shares, in place; a layer's are put together at once."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = set(plain._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def put_together(model: Any) -> None:
    """Make a sharded model plain again, in place, with all its weights in each process: one may go on without others.

    torch has no way back: `unshard` lasts until the next `state_dict`, in which all processes must take part.
    """
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, cut in module._parameters.items():
            if isinstance(cut, DTensor):
                if id(cut) not in plain:  # tied weights stay tied
                    plain[id(cut)] = nn.Parameter(cut.full_tensor(), requires_grad=cut.requires_grad)
                module._parameters[name] = plain[id(cut)]
    for module in model.modules():
        for kind in _HOOKS:
            hooks = getattr(module, kind)
            for key in [key for key, hook in hooks.items() if _is_fsdp(hook)]:
                del hooks[key]
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__mro__[2]  # FSDPLinear -> FSDPModule, Linear


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")


def whole(value: Any, keeps: bool) -> Any:
    """Return a state with whole tensors on the CPU, to a process that keeps it; all of them take part."""
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keeps else None
    if isinstance(value, dict):
        return {name: whole(one, keeps) for name, one in value.items()}
    return [whole(one, keeps) for one in value] if isinstance(value, list) else value


class _Through(nn.Module):
    """What Trainer takes for a model that is wrapped already."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **given: Any) -> Any:
        return self.module(*args, **given)


def sharded_trainer(base: type[Any]) -> type[Any]:
    """Return a trainer whose model is cut into shares before it is trained."""

    class ShardedTrainer(base):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> Any:
            shard(self.model, self.args.device)
            return super().create_optimizer(model)

        def _wrap_model(self, model: Any, training: bool = True, *rest: Any) -> Any:
            # For its autocast alone: the shares are dealt already, which accelerate never does on a CPU.
            return _Through(self.accelerator.prepare_model(model, evaluation_mode=True)) if training else model

        def _clip_grad_norm(self, model: Any) -> Any:
            norm = super()._clip_grad_norm(model)
            return norm.full_tensor() if isinstance(norm, DTensor) else norm

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            adapters = getattr(self.model, "peft_config", None)  # a frozen base is in no checkpoint
            wanted = {
                name: value
                for name, value in self.model.state_dict().items()
                if adapters is None or any(f".{adapter}." in name for adapter in adapters)
            }
            state = whole(wanted, self.args.should_save)
            if self.args.should_save:
                self._save(output_dir, state_dict=state)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            state = whole(self.optimizer.state_dict(), self.args.should_save)
            if self.args.should_save:
                torch.save(state, Path(output_dir) / "optimizer.pt")
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            stored = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
            parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
            for number, moments in stored["state"].items():
                like = parameters[number]
                for name, value in moments.items():
                    if value.shape == like.shape and value.ndim:
                        cut = distribute_tensor(value.to(self.args.device), like.device_mesh, like.placements)
                        moments[name] = cut
            self.optimizer.load_state_dict(stored)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    ShardedTrainer.__name__ = base.__name__
    return ShardedTrainer
