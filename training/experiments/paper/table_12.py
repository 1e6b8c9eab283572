"""Table 12: the paper's notation, which is no measurement, and what it is called here."""

from __future__ import annotations

from training.experiments.paper.section import Section

TITLE = "notation"
CHEAP = True
SPECS = ()

# Meaning, the paper's symbol, name here; a name with a dot is imported in the tests.
NOTATION = (
    ("number of layers, of this one", "L, l", "depth, layer"),
    ("width of the residual stream", "d", "rksp_core.profile.LayerProfile:width"),
    ("token states", "N", "rksp_core.profile.LayerProfile:samples"),
    ("modes that are kept", "m", "rksp_core.profile.LayerProfile:rank"),
    ("rank of the randomized operator of KSS", "r", "training.config.KSS:rank"),
    ("residual states before and after a layer", "X, Y", "h_in, h_out"),
    ("operator of a layer in whitened coordinates", "A", "rksp_core.dmd:whitened_dmd"),
    ("its eigenvalues", "lambda", "rksp_core.profile.LayerProfile:eigenvalues"),
    ("spectral radius", "rho", "rksp_core.profile.LayerProfile:spectral_radius"),
    ("condition of its eigenvectors", "kappa(V)", "rksp_core.profile.LayerProfile:eigenvector_condition"),
    ("Kreiss constant", "K(A)", "rksp_core.profile.LayerProfile:kreiss_classical"),
    (
        "the same with a reference radius, finite where K(A) is not",
        "-",
        "rksp_core.profile.LayerProfile:kreiss_constant",
    ),
    ("expansive mass", "M > 1", "rksp_core.profile.LayerProfile:expansive_mass"),
    ("near-unit mass", "M ~ 1", "rksp_core.profile.LayerProfile:near_unit_mass"),
    ("contractive mass", "M < 1", "rksp_core.profile.LayerProfile:contractive_mass"),
    ("nonlinearity ratio", "eta_nl", "rksp_core.profile.LayerProfile:nonlinearity_ratio"),
    ("edges of the masses", "eps_u, eps_n, delta_c", "rksp_core.spectrum:UPPER, LOWER, CONTRACTIVE"),
    ("residual of a mode, and its threshold", "r_j, tau", "rksp_core.spectrum:RESIDUAL_TOLERANCE"),
    ("KSS term of a layer", "L_KSS", "rksp_core.kss:kss_loss"),
    ("its weight", "alpha", "training.config.KSS:alpha"),
    ("target of the near-unit mass", "gamma", "training.config.KSS:gamma"),
    ("weight of that target", "beta", "training.config.KSS:beta"),
    ("divergence", "D", "training.labels:judge"),
    ("its probability", "P(D = 1)", "divergence_probability"),
)


def section() -> Section:
    """Return the table."""
    return Section(
        name="table_12",
        title=TITLE,
        setting="The paper lists its symbols; nothing is measured.",
        header=("what", "the paper", "here"),
        rows=tuple((meaning, symbol, f"`{name}`") for meaning, symbol, name in NOTATION),
        sentence="Where the paper leaves something open, the docstring behind the name says what was chosen.",
    )
