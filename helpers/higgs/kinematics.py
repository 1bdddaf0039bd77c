"""Compute the derived quantities from those that the detector measures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from helpers.higgs.columns import MISSING


class Particle(NamedTuple):
    """Momenta of one kind of particle: three arrays of shape (n,), with one entry per event."""

    pt: NDArray[np.float64]
    """Transverse momentum in GeV: the component perpendicular to the beams."""
    eta: NDArray[np.float64]
    """Pseudorapidity: 0 perpendicular to the beams, large along them."""
    phi: NDArray[np.float64]
    """Azimuth angle around the beams, in radians."""


def invariant_mass(first: Particle, second: Particle) -> NDArray[np.float64]:
    r"""Compute the invariant mass of two massless particles.

    The formula is :math:`\sqrt{2 p_1 p_2 (\cosh\Delta\eta - \cos\Delta\phi)}`. The published jets
    have a mass that no column contains, so ``DER_mass_jet_jet`` is a few GeV too small.

    Returns
    -------
    ndarray, shape (n,)
        Invariant mass in GeV: ``DER_mass_vis`` and ``DER_mass_jet_jet`` in the appendix of [1]_.
        With the same pseudorapidity for both particles, it is their transverse mass,
        :math:`\sqrt{2 p_1 p_2 (1 - \cos\Delta\phi)}`, as in ``DER_mass_transverse_met_lep``.

    Examples
    --------
    >>> float(invariant_mass(Particle(45.0, 1.0, 0.0), Particle(45.0, 1.0, np.pi)))
    90.0
    """
    delta_eta, delta_phi = np.subtract(first.eta, second.eta), np.subtract(first.phi, second.phi)
    return np.sqrt(2 * first.pt * second.pt * (np.cosh(delta_eta) - np.cos(delta_phi)))


def angular_distance(first: Particle, second: Particle) -> NDArray[np.float64]:
    r"""Compute the angular distance :math:`\sqrt{\Delta\eta^2 + \Delta\phi^2}` of two particles.

    Returns
    -------
    ndarray, shape (n,)
        Angular distance, the short way around the circle: ``DER_deltar_tau_lep`` in the appendix
        of [1]_.

    Examples
    --------
    >>> float(angular_distance(Particle(20.0, 0.0, 3.0), Particle(30.0, 0.0, -3.0)).round(3))
    0.283
    """
    return np.hypot(first.eta - second.eta, wrapped(first.phi - second.phi))


def phi_centrality(phi: ArrayLike, phi_1: ArrayLike, phi_2: ArrayLike) -> NDArray[np.float64]:
    r"""Compute how centrally a direction lies between two others in the transverse plane.

    With :math:`A = \sin(\phi - \phi_1)` and :math:`B = \sin(\phi_2 - \phi)`, both multiplied by
    the sign of :math:`\sin(\phi_2 - \phi_1)`, the centrality is :math:`(A + B) / \sqrt{A^2 + B^2}`.

    Parameters
    ----------
    phi, phi_1, phi_2 : array_like, shape (n,)
        Azimuth angles, in radians, of the direction and of the two others.

    Returns
    -------
    ndarray, shape (n,)
        ``DER_met_phi_centrality`` in the appendix of [1]_: :math:`\sqrt 2` midway between the two
        directions, 1 on either of them, :math:`-\sqrt 2` opposite the middle; 0 where all three lie
        on one line, which leaves the middle undefined.

    Examples
    --------
    >>> phi_centrality(np.array([0.5, 1.0, 3.642]), 0.0, 1.0).round(3).tolist()
    [1.414, 1.0, -1.414]
    """
    orientation = np.sign(np.sin(np.subtract(phi_2, phi_1)))
    a = np.sin(np.subtract(phi, phi_1)) * orientation
    b = np.sin(np.subtract(phi_2, phi)) * orientation
    length = np.hypot(a, b)
    return np.divide(a + b, length, out=np.zeros_like(length), where=length != 0)


def eta_centrality(eta: ArrayLike, eta_1: ArrayLike, eta_2: ArrayLike) -> NDArray[np.float64]:
    r"""Compute how centrally a pseudorapidity lies between those of two jets.

    The formula is :math:`\exp(-4 (\eta - \bar\eta)^2 / (\eta_1 - \eta_2)^2)`, where
    :math:`\bar\eta` is the mean of the jets' pseudorapidities.

    Parameters
    ----------
    eta, eta_1, eta_2 : array_like, shape (n,)
        The pseudorapidity, and those of the jets.

    Returns
    -------
    ndarray, shape (n,)
        ``DER_lep_eta_centrality`` in the appendix of [1]_: 1 midway between the jets, 1/e on either
        of them, approaching 0 outside.

    Examples
    --------
    >>> eta_centrality(np.array([0.0, 2.0]), 2.0, -2.0).round(3).tolist()
    [1.0, 0.368]
    """
    middle, gap = np.add(eta_1, eta_2) / 2, np.subtract(eta_1, eta_2)
    # Jets at the same pseudorapidity enclose nothing: a tiny gap gives the limit, not 0 / 0.
    return np.exp(-4 * ((eta - middle) / np.maximum(np.abs(gap), 1e-9)) ** 2)


def derive_columns(events: pd.DataFrame) -> pd.DataFrame:
    """Compute the derived columns of events from their primitive columns.

    Parameters
    ----------
    events : pandas.DataFrame
        Events with all ``PRI_`` columns.

    Returns
    -------
    pandas.DataFrame
        A copy of `events` with the ``DER_`` columns computed from their definitions, rounded to 3
        decimals like the published ones, and `MISSING` where the event has too few jets.
        ``DER_mass_MMC`` stays unchanged: it comes from a likelihood, not from a formula.

    References
    ----------
    The ``DER_`` columns in the appendix of [1]_.

    Examples
    --------
    >>> from helpers.higgs import generate_events
    >>> events = generate_events(1000, seed=1)
    >>> derive_columns(events).equals(events)
    True
    """
    # NaN propagates through every formula: a result is missing where an input is.
    column = events.replace(MISSING, np.nan)
    tau, lep, leading, subleading = (
        Particle(*(column[f"PRI_{name}_{part}"].to_numpy() for part in Particle._fields))
        for name in ("tau", "lep", "jet_leading", "jet_subleading")
    )
    met, met_phi = column["PRI_met"].to_numpy(), column["PRI_met_phi"].to_numpy()
    higgs = plane(tau.pt, tau.phi) + plane(lep.pt, lep.phi) + plane(met, met_phi)
    # Absent jets contribute nothing, and neither, by definition, do jets beyond these two.
    jets = sum(np.nan_to_num(plane(jet.pt, jet.phi)) for jet in (leading, subleading))
    derived = {
        "DER_mass_transverse_met_lep": invariant_mass(
            lep._replace(eta=0.0), Particle(met, 0.0, met_phi)
        ),
        "DER_mass_vis": invariant_mass(tau, lep),
        "DER_pt_h": np.abs(higgs),
        "DER_deltaeta_jet_jet": np.abs(leading.eta - subleading.eta),
        "DER_mass_jet_jet": invariant_mass(leading, subleading),
        "DER_prodeta_jet_jet": leading.eta * subleading.eta,
        "DER_deltar_tau_lep": angular_distance(tau, lep),
        "DER_pt_tot": np.abs(higgs + jets),
        "DER_sum_pt": tau.pt + lep.pt + column["PRI_jet_all_pt"].to_numpy(),
        "DER_pt_ratio_lep_tau": lep.pt / np.where(tau.pt == 0, np.nan, tau.pt),
        "DER_met_phi_centrality": phi_centrality(met_phi, lep.phi, tau.phi),
        "DER_lep_eta_centrality": eta_centrality(lep.eta, leading.eta, subleading.eta),
    }
    return events.assign(
        **{
            name: np.where(np.isfinite(values), values.round(3), MISSING)
            for name, values in derived.items()
        }
    )


def plane(pt: NDArray[np.float64], phi: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Return transverse momenta as complex numbers, so that a sum is a vector sum."""
    return pt * np.exp(1j * phi)


def wrapped(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `angle` wrapped to the range from -pi to pi."""
    return np.angle(np.exp(1j * angle))
