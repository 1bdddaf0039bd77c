"""Draw events like those of the challenge from a simplified physics model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from helpers.higgs.columns import EVENT_ID, FEATURES, LABEL, MISSING
from helpers.higgs.kinematics import Particle, angular_distance, derive_columns, plane, wrapped


class Process(NamedTuple):
    """Parameters of one kind of collision; energies are in GeV.

    References
    ----------
    The kinds of collision are from section "The data" of [1]_. The numbers are fitted to the first
    6,000 events of [2]_, whose weights suggest the kind of each event.
    """

    label: str
    """Class of the events, ``"s"`` or ``"b"``."""
    share: float
    """Fraction of the class's events."""
    mass: float
    """Mass of the boson that decays."""
    rapidity: float
    """Spread of the boson's rapidity, its motion along the beams."""
    jet_shares: tuple[float, float, float, float]
    """Fractions of the events with 0, 1, 2 and 3 jets."""
    jet_pt: float
    """Mean pt of a lone jet above the threshold `JET_PT`."""
    jet_gap: tuple[float, float]
    """Mean and spread of the difference between the two leading jets' pseudorapidities."""
    soft_pt: float
    """Mean pt of everything that is too soft to be a jet."""
    jet_growth: float = 0.0
    """Fraction by which each additional jet raises the jets' mean pt."""
    unseen_pt: float = 0.0
    """Mean pt of neutrinos that do not come from the boson."""
    other_tau_pt: float = 0.0
    """Mean pt above the threshold `TAU_PT` of a tau that does not come from the boson.

    If 0, the boson decays to two taus, one of which decays to the lepton; otherwise the boson is a
    W that decays to the lepton and a neutrino.
    """


PROCESSES = (
    # A Higgs boson from two gluons: few jets.
    Process(
        label="s", share=0.38, mass=125.0, rapidity=1.1, soft_pt=18.0,
        jet_shares=(0.61, 0.27, 0.09, 0.03), jet_pt=34.0, jet_growth=0.3, jet_gap=(2.0, 1.6),
    ),
    # A Higgs boson from two W or Z bosons: two jets far apart.
    Process(
        label="s", share=0.44, mass=125.0, rapidity=1.0, soft_pt=18.0,
        jet_shares=(0.08, 0.36, 0.47, 0.09), jet_pt=51.0, jet_gap=(3.8, 1.7),
    ),
    # A Higgs boson and a W or Z boson, which decays to jets or neutrinos.
    Process(
        label="s", share=0.13, mass=125.0, rapidity=1.1, soft_pt=18.0, unseen_pt=20.0,
        jet_shares=(0.10, 0.38, 0.36, 0.16), jet_pt=53.0, jet_gap=(1.0, 0.8),
    ),
    # A Higgs boson, which decays to the tau, and a W boson, which decays to the lepton.
    Process(
        label="s", share=0.05, mass=80.4, rapidity=1.1, soft_pt=18.0, unseen_pt=25.0,
        jet_shares=(0.50, 0.25, 0.20, 0.05), jet_pt=53.0, jet_gap=(1.0, 0.8), other_tau_pt=20.0,
    ),
    # A Z boson: like a Higgs boson, but lighter.
    Process(
        label="b", share=0.31, mass=91.2, rapidity=1.6, soft_pt=20.0,
        jet_shares=(0.20, 0.36, 0.25, 0.19), jet_pt=36.0, jet_growth=0.35, jet_gap=(1.9, 1.3),
    ),
    # A W boson, and a jet that looks like a tau.
    Process(
        label="b", share=0.63, mass=80.4, rapidity=1.6, soft_pt=13.0,
        jet_shares=(0.63, 0.27, 0.08, 0.02), jet_pt=22.0, jet_growth=0.5, jet_gap=(1.7, 1.2),
        other_tau_pt=12.0,
    ),
    # Two top quarks, each of which decays to a W boson and a jet.
    Process(
        label="b", share=0.06, mass=80.4, rapidity=1.1, soft_pt=18.0, unseen_pt=25.0,
        jet_shares=(0.05, 0.22, 0.33, 0.40), jet_pt=34.0, jet_gap=(1.7, 1.2), other_tau_pt=24.0,
    ),
)  # fmt: skip
"""The kinds of collision in the challenge: four signals and three backgrounds."""

SIGNAL_SHARE = 0.34
"""Fraction of the challenge's events that are signal."""

TAU_PT, LEP_PT, JET_PT = 20.0, 26.0, 30.0
"""Minimum pt in GeV of a tau, a lepton and a jet in the data."""

TAU_LEP_ETA, JET_ETA = 2.5, 4.5
"""Largest pseudorapidities of taus and leptons, and of jets."""

TAU_LEP_DISTANCE = 0.2
"""Smallest angular distance between the tau and the lepton."""

JET_MIDDLE = 1.2
"""Spread of the pseudorapidity midway between the jets."""

JET_GAP_LIMIT = 7.0
"""Largest difference of the jets' pseudorapidities."""

RAPIDITY_PULL = 0.4
"""Fraction of the jets' pseudorapidity that the boson shares."""

OTHER_TAU_SPREAD = 1.3
"""Spread between the rapidities of the boson and of a tau that does not come from it."""

FURTHER_JETS = 0.4
"""Mean number of jets beyond the third."""

HADRONIC_PART, LEPTONIC_PART = (2.5, 1.6), (1.1, 2.0)
"""Beta distributions of the fraction of a tau's momentum that its neutrinos do not carry away, for
decays seen as a tau and as a lepton."""

SOFT_RESPONSE, TAU_LEP_RESPONSE = 0.4, 0.84
"""Fractions of the soft momentum, and of the tau's and lepton's energy, that are measured."""

SOFT_ENERGY = (1.5, 41.0)
"""Gamma distribution (shape, scale in GeV) of the energy that belongs to no jet, tau or lepton."""

NOISE = 0.85
"""Mean error of the missing momentum, in units of the square root of the summed energy."""

MMC_SCALE, MMC_SLOPE, MMC_ERROR = 1.28, 0.35, 0.11
"""Scale, dependence on missing momentum, and relative error of the modelled MMC mass."""

MMC_LIMIT, MMC_STEEPNESS = 88.0, 5.3
"""Misdirected missing momentum in GeV at which half the events have no mass, and how steeply that
fraction changes."""


def generate_events(
    n: int, seed: int = 0, first_event_id: int = 100_000, signal_share: float = SIGNAL_SHARE
) -> pd.DataFrame:
    """Draw events that resemble those of the challenge.

    The model is a sketch of the physics. A boson recoils against up to three jets and softer
    particles. It decays to a tau and a lepton, and neutrinos carry momentum away; or the tau
    comes from elsewhere. The detector measures soft particles poorly and loses low momenta.
    `derive_columns` computes every derived column from the drawn primitive ones, except
    ``DER_mass_MMC``. The MMC mass is the result of a likelihood calculation without a closed
    formula, so it is drawn around a formula fitted to the published events, and is missing at
    random with a fitted probability.

    For each column and class, mean and spread agree with the published events within 25 % (the
    mean within 25 % of the spread where values have both signs), and the fraction of missing values
    within 0.05. Correlations and tails agree less well: use these events to learn and to test
    programs, never for physics.

    Parameters
    ----------
    n : int
        Number of events.
    seed : int, default 0
        Random seed: the same arguments give the same events.
    first_event_id : int, default 100000
        Identifier of the first event; the next events count up from it.
    signal_share : float, default 0.34
        Fraction of the events that are signal, from 0 to 1.

    Returns
    -------
    pandas.DataFrame, shape (n, 32)
        `EVENT_ID`, the 30 `FEATURES` and `LABEL`. Momenta, masses and energies are in GeV, angles
        in radians, all rounded to 3 decimals.

    Raises
    ------
    ValueError
        If `n` is negative, or `signal_share` is not from 0 to 1.

    References
    ----------
    Fitted to aggregated statistics of the first 6,000 events of [2]_; no event is stored.

    Examples
    --------
    >>> events = generate_events(3, seed=1)
    >>> events.shape
    (3, 32)
    >>> events["EventId"].tolist()
    [100000, 100001, 100002]
    """
    generator = np.random.default_rng(seed)
    class_shares = {"s": signal_share, "b": 1 - signal_share}
    shares = [process.share * class_shares[process.label] for process in PROCESSES]
    kinds = generator.choice(len(PROCESSES), size=n, p=shares)
    parts = []
    for kind, process in enumerate(PROCESSES):
        rows = np.flatnonzero(kinds == kind)
        primitives = _draw_primitives(generator, process, len(rows))
        parts.append(pd.DataFrame(primitives, index=rows).assign(**{LABEL: process.label}))
    # Round first, so that the columns of the finished event are consistent with each other.
    events = derive_columns(pd.concat(parts).sort_index().round(3))
    events["DER_mass_MMC"] = _draw_mmc(generator, events)
    events[EVENT_ID] = np.arange(first_event_id, first_event_id + n)
    return events[[EVENT_ID, *FEATURES, LABEL]]


def _draw_primitives(generator: Generator, process: Process, n: int) -> dict[str, NDArray]:
    """Draw the primitive columns of `n` events of `process`."""
    columns, jets, jet_middle = _draw_jets(generator, process, n)
    soft = _draw_plane(generator, process.soft_pt, n)
    # The colliding protons bring no transverse momentum: the boson balances everything else.
    tau, lep = _draw_tau_and_lep(generator, process, -jets - soft, jet_middle)
    # Soft particles contribute the rest of the summed energy, whatever their direction.
    summed = (
        columns["PRI_jet_all_pt"]
        + TAU_LEP_RESPONSE * (tau.pt + lep.pt)
        + generator.gamma(*SOFT_ENERGY, n)
    )
    noise = _draw_plane(generator, NOISE * np.sqrt(summed), n)
    seen = jets + SOFT_RESPONSE * soft + plane(tau.pt, tau.phi) + plane(lep.pt, lep.phi)
    missing = noise - seen
    columns["PRI_met"] = np.abs(missing)
    columns["PRI_met_phi"] = np.angle(missing)
    columns["PRI_met_sumet"] = summed
    for name, particle in {"tau": tau, "lep": lep}.items():
        for part, values in particle._asdict().items():
            columns[f"PRI_{name}_{part}"] = values
    return columns


def _draw_plane(generator: Generator, mean: ArrayLike, n: int) -> NDArray[np.complex128]:
    """Draw `n` transverse momenta in any direction, exponentially distributed with `mean`."""
    return plane(generator.exponential(mean, n), generator.uniform(-np.pi, np.pi, n))


def _draw_jets(
    generator: Generator, process: Process, n: int
) -> tuple[dict[str, NDArray], NDArray[np.complex128], NDArray[np.float64]]:
    """Draw the jets' columns, total transverse momentum and middle pseudorapidity."""
    number = generator.choice(4, size=n, p=process.jet_shares)
    exists = np.arange(3)[:, np.newaxis] < number
    mean = process.jet_pt * (1 + process.jet_growth * (number - 1))
    # The leading jet comes first, and the zeros of absent jets last.
    excess = np.sort(generator.exponential(mean, (3, n)) * exists, axis=0)[::-1]
    pt = (JET_PT + excess) * exists
    # The published number of jets stops at three, so the third also represents any further ones.
    pt[2] *= 1 + generator.poisson(FURTHER_JETS, n)
    eta = _draw_jet_eta(generator, process, n)
    phi = generator.uniform(-np.pi, np.pi, (3, n))
    # The second jet balances the first a little: a power below 1 favours the opposite side.
    turn = np.pi * generator.random(n) ** 0.8 * generator.choice((-1, 1), n)
    phi[1] = wrapped(phi[0] + turn)
    columns = {"PRI_jet_num": number, "PRI_jet_all_pt": pt.sum(axis=0)}
    for row, name in enumerate(("leading", "subleading")):
        for part, values in (("pt", pt), ("eta", eta), ("phi", phi)):
            columns[f"PRI_jet_{name}_{part}"] = np.where(exists[row], values[row], MISSING)
    return columns, plane(pt, phi).sum(axis=0), eta.mean(axis=0)


def _draw_jet_eta(generator: Generator, process: Process, n: int) -> NDArray[np.float64]:
    """Draw the pseudorapidities of `n` pairs of jets, shape (2, n)."""
    mean, spread = np.divide(process.jet_gap, JET_GAP_LIMIT)
    # Parameters of the beta distribution on (0, 1) with this mean and spread.
    strength = mean * (1 - mean) / spread**2 - 1
    gap = JET_GAP_LIMIT * generator.beta(mean * strength, (1 - mean) * strength, n)
    half = gap / 2 * generator.choice((-1, 1), n)
    eta = generator.normal(0, JET_MIDDLE, n) + np.array([half, -half])
    # Jets beyond the detector's limit are mirrored back inside.
    return np.where(np.abs(eta) > JET_ETA, np.sign(eta) * 2 * JET_ETA - eta, eta)


def _draw_tau_and_lep(
    generator: Generator,
    process: Process,
    recoil: NDArray[np.complex128],
    jet_middle: NDArray[np.float64],
) -> tuple[Particle, Particle]:
    """Draw a tau and a lepton for each recoil, repeating until the detector keeps both."""
    tau, lep = np.empty((2, 3, len(recoil)))
    rows = np.arange(len(recoil))
    while len(rows):
        drawn = _draw_decay(generator, process, recoil[rows], jet_middle[rows])
        tau[:, rows], lep[:, rows] = drawn
        rows = rows[~_is_kept(*drawn)]
    return Particle(*tau), Particle(*lep)


def _is_kept(tau: Particle, lep: Particle) -> NDArray[np.bool_]:
    """Return which pairs the detector keeps."""
    return (
        (tau.pt > TAU_PT)
        & (lep.pt > LEP_PT)
        & (np.abs(tau.eta) < TAU_LEP_ETA)
        & (np.abs(lep.eta) < TAU_LEP_ETA)
        & (angular_distance(tau, lep) > TAU_LEP_DISTANCE)
    )


def _draw_decay(
    generator: Generator,
    process: Process,
    recoil: NDArray[np.complex128],
    jet_middle: NDArray[np.float64],
) -> tuple[Particle, Particle]:
    """Draw a tau and a lepton for each recoil, whether or not the detector keeps them."""
    n = len(recoil)
    rapidity = generator.normal(RAPIDITY_PULL * jet_middle, process.rapidity)
    boson = recoil - _draw_plane(generator, process.unseen_pt, n)
    if process.other_tau_pt:
        tau = Particle(
            # A gamma distribution of shape 0.7 has a longer tail than an exponential one.
            pt=TAU_PT + generator.gamma(0.7, process.other_tau_pt / 0.7, n),
            eta=generator.normal(rapidity, OTHER_TAU_SPREAD),
            phi=generator.uniform(-np.pi, np.pi, n),
        )
        lep, _ = _split(generator, process.mass, boson - plane(tau.pt, tau.phi), rapidity)
        return tau, lep
    tau, lep = _split(generator, process.mass, boson, rapidity)
    return (
        tau._replace(pt=tau.pt * generator.beta(*HADRONIC_PART, n)),
        lep._replace(pt=lep.pt * generator.beta(*LEPTONIC_PART, n)),
    )


def _split(
    generator: Generator,
    mass: float,
    transverse: NDArray[np.complex128],
    rapidity: NDArray[np.float64],
) -> tuple[Particle, Particle]:
    """Decay bosons to two massless particles that fly apart in any direction."""
    n = len(transverse)
    transverse_energy = np.hypot(mass, np.abs(transverse))
    energy = transverse_energy * np.cosh(rapidity)
    boson = np.array([transverse.real, transverse.imag, transverse_energy * np.sinh(rapidity)])
    cosine = generator.uniform(-1, 1, n)
    across = plane(np.sqrt(1 - cosine**2), generator.uniform(-np.pi, np.pi, n))
    # In the boson's rest frame each particle has half the mass as energy; the Lorentz boost then
    # moves the pair with the boson.
    at_rest = mass / 2 * np.array([across.real, across.imag, cosine])
    along = np.sum(at_rest * boson, axis=0)
    first = at_rest + boson * (along / (mass * (energy + mass)) + 0.5)
    return _polar(first), _polar(boson - first)


def _polar(momentum: NDArray[np.float64]) -> Particle:
    """Return momenta along x, y and z as particles."""
    x, y, z = momentum
    pt = np.hypot(x, y)
    return Particle(pt, np.arcsinh(z / pt), np.arctan2(y, x))


def _draw_mmc(generator: Generator, events: pd.DataFrame) -> pd.Series:
    """Draw the MMC mass of events around a fit; it is `MISSING` where there is no solution."""
    met = events["PRI_met"]
    visible_pt = events["PRI_tau_pt"] + events["PRI_lep_pt"]
    error = generator.normal(0, MMC_ERROR, len(events))
    mass = MMC_SCALE * events["DER_mass_vis"] * np.exp(MMC_SLOPE * met / visible_pt + error)
    tau = plane(events["PRI_tau_pt"], events["PRI_tau_phi"])
    lep = plane(events["PRI_lep_pt"], events["PRI_lep_phi"])
    # A tau's neutrinos fly along with it; momentum missing in other directions has other causes.
    astray = met * (1 - np.cos(events["PRI_met_phi"] - np.angle(tau + lep)))
    solution_share = 1 / (1 + (astray / MMC_LIMIT) ** MMC_STEEPNESS)
    return mass.round(3).where(generator.random(len(events)) < solution_share, MISSING)
