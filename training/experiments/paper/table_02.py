"""Table 2: which score at launch ranks the runs that diverge.

The runs are those of ``specs/risk.yaml``, not the paper's: a language that is learned, 644 configurations over norm,
rate, depth, width, initialization and optimizer. The table is made of the part ``held_out``; the risk model that stands
beside the paper's predictors was fitted to ``tuning``.
"""

from __future__ import annotations

TITLE = "scores at launch, and how well they rank the runs that diverge"
CHEAP = False
SPECS = ()
