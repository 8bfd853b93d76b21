"""What torch sees of this machine, as JSON: `python -m align_pipeline.stages.machine`.

A process of its own, so that a torch that cannot be imported, or crashes while it is, is an answer like any other.
"""

from __future__ import annotations

import json
from typing import Any


def probe() -> dict[str, Any]:
    """Return the build of torch and the devices it can use."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": []}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            found["devices"].append({"name": name, "free_bytes": free, "total_bytes": total})
        found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    return found


def main() -> None:
    """Print what was found, or why nothing was."""
    try:
        found = probe()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
