"""A changed default is another result for the same file: it must come with a raised version."""

import json
from pathlib import Path

from align_pipeline.stages import STAGES

GOLDEN = Path(__file__).with_name("defaults.json")


def defaults() -> dict[str, dict]:
    found = {}
    for name, cls in STAGES.items():
        fields = {
            field: json.loads(json.dumps(plain(info.default)))
            for field, info in cls.model_fields.items()
            if field != "how" and not info.is_required()
        }
        found[name] = {"version": cls.version, "defaults": fields}
    return found


def plain(value: object) -> object:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def test_a_changed_default_raises_the_version():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for name, now in defaults().items():
        before = golden[name]
        changed = {
            field: (value, now["defaults"].get(field, "gone"))
            for field, value in before["defaults"].items()
            if now["defaults"].get(field, "gone") != value
        }
        if changed:
            assert now["version"] > before["version"], f"{name}: {changed}: raise its version, then renew {GOLDEN.name}"
        assert now == before, f"{name}: renew {GOLDEN.name}"
    assert set(golden) == set(STAGES)
