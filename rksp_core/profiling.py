"""Model and probe batch -> profile: one forward pass, then each block's operator, spectrum and Kreiss constant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from torch import nn

from rksp_core.batch import Batch, batch_sha256
from rksp_core.capture import Block, capture
from rksp_core.dmd import EPS, EpsMode, whitened_dmd
from rksp_core.eigensystem import eigensystem
from rksp_core.kreiss import kreiss_constant, transient_growth
from rksp_core.moments import Moments
from rksp_core.profile import LayerProfile, ModelProfile, finite_or_none
from rksp_core.spectrum import CONTRACTIVE, LOWER, RESIDUAL_TOLERANCE, UPPER, spectrum
from rksp_core.wasserstein import modulus_quantiles
from rksp_core.weight_norms import weight_norms

REMEDIES = {
    "rank_deficient": "the stream spans fewer directions than its width: use more varied tokens, or read m beside d",
    "rank_capped": "too few distinct tokens for the full width, so only the leading directions are kept: "
    "give at least 2 x width distinct tokens",
    "interpolating": "fewer than two distinct tokens a direction, so residuals vanish by construction: "
    "give more tokens or a lower rank",
    "degenerate_update": "the block passes its input on (a zero-initialised branch?), so its operator is the identity "
    "and says nothing yet: profile again after some steps",
    "not_finite": "activations are not finite: lower the learning rate or the initial scale, or use a wider dtype",
}

Progress = Callable[[int, int, str], None]


def profile_model(
    model: nn.Module,
    batch: Batch,
    *,
    blocks: str | Sequence[str] | Sequence[Block] | None = None,
    samples: int = 2048,
    seed: int = 0,
    rank: int | None = None,
    eps: float = EPS,
    eps_mode: EpsMode = "relative",
    micro_batch: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    probe: Mapping[str, Any] | None = None,
) -> ModelProfile:
    """Profile the residual stream of a model on a probe batch (Kim et al. 2026, Alg. 1).

    The model, its modes and the random state are left as found.

    Parameters
    ----------
    model
        Any module with a stack of residual blocks.
    batch
        Tensor (``model(batch)``), tuple (``model(*batch)``) or dict (``model(**batch)``); moved to the model's device.
    blocks
        Glob such as ``transformer.h.*``, several, or the blocks; None finds them.
    samples
        N, at most this many token states, drawn with ``seed``.
    rank
        None keeps every direction the data span; r takes the r leading ones by a randomized sketch.
    eps, eps_mode
        Regularization of the whitening, relative to the mean variance (default) or absolute as in Eq. 9.
    micro_batch
        Sequences in one forward pass; None runs all at once. The profile does not depend on it.
    executor
        Spreads the layers; nothing is spawned here.
    progress
        Called with (layers done, layers in all, name) after each layer.
    probe
        What the profile says about its probe; its ``sha256`` is computed where it is missing.

    Returns
    -------
    ModelProfile
        Numerical trouble is a status of the layer, with a remedy: an unstable model is a finding, not an error.

    Raises
    ------
    NoBlocksError
        When no blocks are found; the message lists the candidates.
    ModelError
        When the model does not run on the batch.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    captured = capture(model, batch, blocks=blocks, samples=samples, seed=seed, micro_batch=micro_batch)
    options: dict[str, Any] = {"rank": rank, "eps": eps, "eps_mode": eps_mode, "seed": seed, "depth": len(captured)}
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), None)
    settings = {
        "samples": samples,
        "seed": seed,
        "rank": rank,
        "eps": eps,
        "eps_mode": eps_mode,
        "dtype": dtype,
        "near_unit_from": LOWER,
        "expansive_above": UPPER,
        "contractive_below": CONTRACTIVE,
        "residual_tolerance": RESIDUAL_TOLERANCE,
    }
    about = dict(probe or {})
    about.setdefault("sha256", batch_sha256(batch))
    weights = weight_norms(model, [name for name, _ in captured])
    return ModelProfile(tuple(_profile_all(captured, options, executor, progress)), settings, about, weights=weights)


def profile_layer(
    name: str,
    moments: Moments,
    *,
    depth: int,
    rank: int | None = None,
    eps: float = EPS,
    eps_mode: EpsMode = "relative",
    seed: int = 0,
) -> LayerProfile:
    """Return the profile of one block from its moments.

    ``depth`` is the number of blocks L: the horizon of the transient growth max_{n <= L} |A^n| / theta^n.
    """
    sizes: dict[str, Any] = {
        "layer": name,
        "width": moments.width,
        "samples": moments.count,
        "distinct_samples": moments.distinct,
        "growth_horizon": depth,
    }
    if not moments.finite:
        return LayerProfile(**sizes, rank=0, status=("not_finite",), remedy=REMEDIES["not_finite"])
    if moments.count < 2:
        return LayerProfile(**sizes, rank=0, status=("rank_deficient",), remedy=REMEDIES["rank_deficient"])
    operator = whitened_dmd(moments, eps=eps, eps_mode=eps_mode, rank=rank, seed=seed)
    remedy = "; ".join(REMEDIES[status] for status in operator.status)
    if operator.rank == 0:
        return LayerProfile(**sizes, rank=0, status=operator.status, remedy=remedy)
    system = eigensystem(operator.matrix)
    figures = spectrum(operator, system)
    kreiss = kreiss_constant(operator.matrix, eigensystem=system)
    masses: dict[str, Any] = figures.masses
    return LayerProfile(
        **sizes,
        rank=operator.rank,
        **masses,
        reliable=figures.reliable,
        spectral_radius=figures.spectral_radius,
        eigenvector_condition=finite_or_none(figures.eigenvector_condition),
        sigma_max=figures.sigma_max,
        henrici_departure=figures.henrici_departure,
        kreiss_constant=finite_or_none(kreiss.value),
        kreiss_theta=kreiss.theta,
        kreiss_classical=finite_or_none(kreiss.classical),
        transient_growth=finite_or_none(transient_growth(operator.matrix, depth, kreiss.theta, eigensystem=system)),
        nonlinearity_ratio=operator.nonlinearity_ratio,
        update_ratio=operator.update_ratio,
        modulus_quantiles=modulus_quantiles(figures.eigenvalues.tolist()),
        status=operator.status or ("ok",),
        remedy=remedy,
        eigenvalues=tuple(figures.eigenvalues.tolist()),
    )


def _profile_all(
    captured: list[tuple[str, Moments]], options: dict[str, Any], executor: Executor | None, progress: Progress | None
) -> Iterable[LayerProfile]:
    total = len(captured)
    if executor is None:
        # Moments are released layer by layer: at width 4096 each holds 400 MB.
        results = (profile_layer(*captured.pop(0), **options) for _ in range(total))
    else:
        futures = [executor.submit(profile_layer, name, moments, **options) for name, moments in captured]
        captured.clear()
        results = (future.result() for future in futures)
    for done, layer in enumerate(results, start=1):
        if progress is not None:
            progress(done, total, layer.layer)
        yield layer
