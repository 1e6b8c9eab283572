"""A policy that tests bring along, so that they do not hang on the shipped thresholds.

Its first rules are the ones that `rksp` had before any were measured: a falling near-unit mass, alone and together with
a rising non-normality. The rest looks at the trainer's own figures.
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
MASSES = Policy(rules=RULES, ladder=LADDER)
# The rules as a policy file has them (JSON is YAML).
RULES_AS_TEXT = "rules: " + json.dumps(
    [
        {
            "name": rule.name,
            "level": rule.level,
            "all": [condition.to_dict() for condition in rule.all],
            "arm_after_step": rule.arm_after_step,
        }
        for rule in RULES
    ]
)
