"""What all sections of a configuration share: the base class, and types of their settings."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Layer = Literal["layer1", "layer2", "layer3"]
Precision = Literal["auto", "fp32", "bf16"]


class Section(BaseModel):
    """Base class of all sections: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
