"""A policy that tests bring along, so that they do not hang on the shipped thresholds.

Its first rules are the ones that `rksp` had before any were measured: a falling near-unit mass, alone and together with
a rising non-normality. The rest looks at the trainer's own figures. Its ladder is the paper's: KSS from level 2 on.
"""

from __future__ import annotations

import json

from rksp_core.policy import Condition, Policy, Rule, Rung

_FALLS = Condition("near_unit_mass_min", 0.0475, direction="falls")
RULES = (
    Rule("mass_falls_and_henrici_rises", 2, (_FALLS, Condition("log_henrici_max", 1.22)), arm_after_step=60),
    Rule("mass_falls_and_kreiss_rises", 2, (_FALLS, Condition("log_kreiss_mean", 0.7)), arm_after_step=60),
    Rule("mass_falls", 1, (Condition("near_unit_mass_min", 0.15, direction="falls"),), arm_after_step=60),
    Rule("kreiss_rises", 1, (Condition("log_kreiss_mean", 1.0),), arm_after_step=60),
    Rule("gradient_norm_is_large", 3, (Condition("gradient_norm", 500.0, "absolute"),)),
    Rule("loss_is_large", 3, (Condition("loss", 50.0, "absolute"),)),
    Rule("activations_not_finite", 3, (Condition("not_finite_layers", 0.0, "absolute"),)),
    Rule("loss_or_gradient_not_finite", 3, (Condition("not_finite_figures", 0.0, "absolute"),)),
)
LADDER = {0: Rung(), 2: Rung(alpha=0.15)}
MASSES = Policy(
    rules=RULES,
    clear_after=5,
    cooldown_steps=100,
    expires_in=86400.0,
    ratchet=False,
    rollback_margin=0,
    ladder=LADDER,
)
_RULES = [
    {
        "name": rule.name,
        "level": rule.level,
        "all": [condition.to_dict() for condition in rule.all],
        "arm_after_step": rule.arm_after_step,
    }
    for rule in RULES
]


def as_text(**changes: object) -> str:
    """Return the policy as a policy file has it, one setting a line (JSON is YAML)."""
    settings = vars(MASSES) | {"rules": _RULES, "ladder": {0: {"alpha": 0.0}, 2: {"alpha": 0.15}}} | changes
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items())
