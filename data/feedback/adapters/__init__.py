"""The products whose logs are read: one file each, and this table. `table` reads anyone's, by a mapping."""

from __future__ import annotations

from align_pipeline.data.feedback.adapter import Adapter
from align_pipeline.data.feedback.adapters import (
    events,
    fastchat,
    langfuse,
    librechat,
    lmarena,
    oasst,
    openai_dpo,
    openwebui,
    tensorzero,
    trl,
)

ADAPTERS: dict[str, Adapter] = {
    one.name: one
    for one in (
        events.ADAPTER,
        openwebui.ADAPTER,
        librechat.ADAPTER,
        langfuse.ADAPTER,
        tensorzero.ADAPTER,
        fastchat.ADAPTER,
        lmarena.ADAPTER,
        oasst.ADAPTER,
        openai_dpo.ADAPTER,
        trl.PREFERENCE_ADAPTER,
        trl.UNPAIRED_ADAPTER,
    )
}
