"""What a user may decide about turning feedback into rows: every setting with its default, once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from align_pipeline.data.feedback.scale import Scale

Product = Literal[
    "events",
    "openwebui",
    "fastchat",
    "lmarena",
    "langfuse",
    "librechat",
    "tensorzero",
    "oasst",
    "openai-dpo",
    "trl-preference",
    "trl-unpaired",
]
"""Whose log it is."""

Word = Literal[1, -1, 0]


class Settings(BaseModel):
    """How events become preference pairs and unpaired rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, protected_namespaces=())

    format: Product | None = None
    """Whose logs these are. None: the first rows of each file tell."""
    columns: dict[str, str] = {}
    """Our name -> the file's, for a table of your own: prompt, response, label, user_id, ts and so on."""
    labels: dict[str, Word] = {}
    """With `columns`: what the words in the label's column mean, 1 up, -1 down, 0 neither."""
    rating_scale: Scale | None = None
    """With `columns`: pm1 (-1, 0, 1), zero_one, stars5 (1 to 5) or unit (0 to 1). None: the ratings tell."""
    strip_reasoning: bool = True
    """Take thoughts and the cards of tool calls off answers, on both sides alike."""
    require_consent: bool = False
    """Use only events that say `consent: true`; those that say false are never used."""
    actors: tuple[Literal["end_user", "admin", "annotator", "model"], ...] = Field(
        ("end_user", "admin", "annotator"), min_length=1
    )
    """Whose judgements count; model judges do not unless they are named."""
    admin_weight: int = Field(3, ge=1, le=100)
    """Votes that one vote of an admin is worth."""
    ignore_system: bool = False
    """Pair answers to prompts that differ in their system turn only; the chosen answer's one is written."""
    regenerations: bool = False
    """Make pairs of answers that were kept over an earlier try; people regenerate from curiosity too."""
    min_confidence: float = Field(0.75, gt=0.5, lt=1)
    """Pairs of thumbs whose order is less certain than this are left out."""
    pairs_per_prompt: int = Field(4, ge=1)
    """Pairs that one prompt may give."""
    unpaired_per_prompt: int = Field(20, ge=1)
    """Unpaired rows that one prompt may give."""
    user_share: float = Field(0.05, gt=0, le=1)
    """Share of the rows that may rest on one user alone; applied from ten users on, and never below 20 rows."""
    drop_suspects: bool = False
    """Leave out the votes of users that vote as no person does: over 30 in a minute, or 50 and more all one way."""
    margins: bool = False
    """Give each pair a `margin`, min(3, ln(p / (1 - p))), which `reward` learns from."""
    policy_model: str | None = None
    """The model that will be trained; rows tell whether their answers are its own (`fb_on_policy`)."""
    pii: Literal["off", "fast"] = "fast"
    """Replace e-mail addresses, telephone numbers, cards, accounts, addresses and keys by tags, alike on both sides."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the groups of like prompts and conversations that is kept for testing."""
    max_invalid_share: float = Field(0.05, ge=0, le=1)
    """Share of records that may be invalid; above it the rows are written and the exit code is 3."""
    seed: int = 0
    """Another seed, another choice where caps choose, and another order and split."""

    @field_validator("columns")
    @classmethod
    def _are_of_no_product(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        """Refuse what would be ignored: columns say whose log it is themselves."""
        if value and info.data.get("format"):
            raise ValueError(f"cannot be mapped with format: {info.data['format']}, which names its own; leave one out")
        return value

    @field_validator("labels", "rating_scale")
    @classmethod
    def _reads_columns(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what would be ignored: products' own logs have their own words and scales."""
        if value and "columns" in info.data and not info.data["columns"]:
            raise ValueError("is read with columns only; map the columns (--column prompt=NAME ...), or leave it out")
        return value
