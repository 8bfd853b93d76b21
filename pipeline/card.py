"""The model card of an export: what it was made from and how, as the hub reads it, without this machine's paths.

The header is the hub's YAML. The licence is the base's where that is known; where it is not, it says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from align_pipeline.pipeline.stage import Resolved
from align_pipeline.pipeline.store import Artifact

_ABOUT = {
    "pretrain": "pretraining",
    "sft": "supervised fine-tuning",
    "reward": "a reward model from preferences (Bradley-Terry)",
    "dpo": "direct preference optimisation",
    "kto": "Kahneman-Tversky optimisation",
    "ppo": "proximal policy optimisation",
    "merge": "base and adapter merged",
    "sample": "pairs or answers drawn from a model",
    "feedback": "rows from feedback",
    "evaluate": "evaluation",
}
_LICENCE = ("license", "license_name", "license_link")
_VERSIONS = ("align", "python", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm")


def card(
    title: str, artifact: Artifact, chain: Sequence[Artifact], base: Resolved | None, form: str, proof: Sequence[str]
) -> str:
    """Return README.md: `chain` is what the artifact was made from, itself last; `proof` is how it was checked."""
    head = yaml.safe_dump(_header(artifact, chain, base, form), sort_keys=False, allow_unicode=True)
    lines = [f"# {title}", "", *_what(artifact, base, form), "", *_use(artifact, base, form), ""]
    lines += ["## How it was made", ""]
    for number, one in enumerate(chain, 1):
        lines += _step(number, one)
    lines += ["", "## Checked at export", "", *(f"- {line}" for line in proof), "", "## Versions", ""]
    made = artifact.record["made"]
    lines.append(", ".join(f"{name} {made[name]}" for name in _VERSIONS if made.get(name)))
    return f"---\n{head}---\n\n" + "\n".join(lines) + "\n"


def _header(artifact: Artifact, chain: Sequence[Artifact], base: Resolved | None, form: str) -> dict[str, Any]:
    reward = artifact.kind == "reward_model"
    header: dict[str, Any] = dict(licence(base))
    if base is not None and base.hub:
        header["base_model"] = base.hub
        header["base_model_relation"] = "adapter" if form == "adapter" else "finetune"
    header["library_name"] = "peft" if form == "adapter" else "transformers"
    header["pipeline_tag"] = "text-classification" if reward else "text-generation"
    header["tags"] = ["align-pipeline", *dict.fromkeys(one.record["stage"] for one in chain)]
    header["tags"] += ["reward-model"] if reward else []
    refs = [source["ref"] for one in chain for field, source in one.record["inputs"].items() if _is_data(one, field)]
    hub = [ref.removeprefix("hub:").partition("@")[0] for ref in refs if ref.startswith("hub:")]
    return header | ({"datasets": list(dict.fromkeys(hub))} if hub else {})


def licence(base: Resolved | None) -> dict[str, str]:
    """Return the licence fields of the base's own card; `unknown` where there is none to be read."""
    text = _base_card(base)
    parts = text.split("---", 2) if text.startswith("---") else []
    try:
        header = yaml.safe_load(parts[1]) if len(parts) == 3 else None
    except yaml.YAMLError:
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("license"), str):
        return {"license": "unknown"}
    return {name: str(header[name]) for name in _LICENCE if header.get(name)}


def _base_card(base: Resolved | None) -> str:
    """Return the README.md of the base; empty when there is none, or no network to read it from."""
    if base is None:
        return ""
    try:
        if base.path is not None:
            path = Path(base.path) / "README.md"
        else:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(base.hub), "README.md", revision=base.revision))
        return path.read_text(encoding="utf-8")
    except Exception:  # a licence that cannot be read is unknown, whatever the reason
        return ""


def _what(artifact: Artifact, base: Resolved | None, form: str) -> Iterator[str]:
    what = {"model": "A language model", "reward_model": "A reward model"}[artifact.kind]
    shape = "a LoRA adapter" if form == "adapter" else "whole weights"
    yield f"{what}, as {shape}, made by [align](https://pypi.org/project/align-pipeline/)."
    yield ""
    if base is not None:
        name = f"`{base.hub}` at `{base.revision}`" if base.hub else f"`{_short(base.ref)}`"
        yield f"- base: {name} (`{base.digest}`)"
    yield f"- made as: `{artifact.key}` (`{artifact.digest}`)"
    if artifact.record["config"].get("quantize"):
        yield f"- the base was held in {artifact.record['config']['quantize']} while the adapter was trained"


def _use(artifact: Artifact, base: Resolved | None, form: str) -> Iterator[str]:
    """Yield code that loads the folder with Transformers and PEFT alone."""
    reward = artifact.kind == "reward_model"
    cls = "ForSequenceClassification" if reward else "ForCausalLM"
    labels = ", num_labels=1" if reward else ""
    yield "```python"
    if form == "adapter":
        yield f"from peft import AutoPeftModel{cls}"
        yield "from transformers import AutoTokenizer"
        yield ""
        yield f'model = AutoPeftModel{cls}.from_pretrained("THIS FOLDER"{labels})'
    else:
        yield f"from transformers import AutoModel{cls}, AutoTokenizer"
        yield ""
        yield f'model = AutoModel{cls}.from_pretrained("THIS FOLDER")'
    yield 'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")'
    yield "```"
    if reward:
        yield ""
        yield "The score of an answer is the one logit at the last token of prompt and answer; only differences matter."


def _step(number: int, one: Artifact) -> Iterator[str]:
    """Yield what one stage read, how it was set, and what it measured."""
    record = one.record
    yield f"{number}. **{record['stage']}**: {_ABOUT.get(record['stage'], record['stage'])} (`{one.key}`)"
    for field, source in record["inputs"].items():
        made = f" (`{source['artifact']}`)" if source.get("artifact") else ""
        rows = _rows(one, field)
        yield f"   - {field}: `{_short(source['ref'])}`{made}, `{source['digest']}`{rows}"
    config = {name: value for name, value in record["config"].items() if name != "lora" or _has_adapter(record)}
    if settings := ", ".join(f"{name} {value}" for name, value in _flat(config)):
        yield f"   - settings: {settings}"
    if metrics := ", ".join(f"{name} {value:.6g}" for name, value in record["metrics"].items()):
        yield f"   - metrics: {metrics}"


def _has_adapter(record: Mapping[str, Any]) -> bool:
    return bool((record.get("model") or {}).get("adapter"))


def _is_data(one: Artifact, field: str) -> bool:
    return field.partition(".")[0] in (one.record.get("data") or {})


def _rows(one: Artifact, field: str) -> str:
    """Return how many rows a field's source held, and how many were trained on."""
    name = field.partition(".")[0]
    report = (one.record.get("data") or {}).get(name)
    if not isinstance(report, Mapping) or not isinstance(report.get("rows"), int):
        return ""
    fields = [key for key in one.record["inputs"] if key.partition(".")[0] == name]
    sources = report.get("sources") or []
    if len(fields) != len(sources):
        return f", {report['rows']:,} rows"
    source = sources[fields.index(field)]
    trained = f", {source['trained_on']:,} trained on" if "trained_on" in source else ""
    return f", {source['rows']:,} rows{trained}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings that say something, nested ones under dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            yield prefix + name, _short(value) if isinstance(value, str) else json.dumps(value)


def _short(text: str) -> str:
    """Return a reference or a setting without the folders of this machine."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ("file", "artifact"):
        return f"{scheme}:{PurePath(rest).name}"
    return PurePath(text).name if text.startswith(("/", "~")) else text
