"""What keeps a run from diverging, beside KSS; each is off (null) unless named, and they combine."""

from __future__ import annotations

from training.schema.section import Positive, Section


class Stabilizers(Section):
    """``clip``: the largest gradient norm (Pascanu et al. 2013)."""

    clip: Positive | None = None
