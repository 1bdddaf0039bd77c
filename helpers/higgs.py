"""Higgs boson challenge events: their columns, their files, and a generator of similar events.

The ATLAS collaboration published simulated proton-proton collisions for the Higgs boson machine
learning challenge of 2014. Each event has 30 features: quantities that a detector measures
(``PRI_``, for primitive) and quantities that physicists compute from them (``DER_``, for derived).
The task is to tell the decays of a Higgs boson into two tau leptons (signal, ``s``) from other
processes that look alike (background, ``b``).

`read_events` reads the published files. `generate_events` draws events of the same kind with a
simplified physics model, so that the tutorial also works without a download.

References
----------
.. [1] C. Adam-Bourdarios et al., "Learning to discover: the Higgs boson machine learning
   challenge", 2014, its appendix describes the features. Published with the results in PMLR 42,
   pages 19-55, 2015, http://proceedings.mlr.press/v42/cowa14.html
.. [2] ATLAS collaboration, "Dataset from the ATLAS Higgs Boson Machine Learning Challenge 2014",
   CERN Open Data record 328, https://doi.org/10.7483/OPENDATA.ATLAS.ZBP2.M5T8
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    DataType,
    DoubleType,
    IntegerType,
    LongType,
    StringType,
    StructField,
    StructType,
)

EVENT_ID = "EventId"
"""Name of the column that identifies an event."""

FEATURES = (
    "DER_mass_MMC",
    "DER_mass_transverse_met_lep",
    "DER_mass_vis",
    "DER_pt_h",
    "DER_deltaeta_jet_jet",
    "DER_mass_jet_jet",
    "DER_prodeta_jet_jet",
    "DER_deltar_tau_lep",
    "DER_pt_tot",
    "DER_sum_pt",
    "DER_pt_ratio_lep_tau",
    "DER_met_phi_centrality",
    "DER_lep_eta_centrality",
    "PRI_tau_pt",
    "PRI_tau_eta",
    "PRI_tau_phi",
    "PRI_lep_pt",
    "PRI_lep_eta",
    "PRI_lep_phi",
    "PRI_met",
    "PRI_met_phi",
    "PRI_met_sumet",
    "PRI_jet_num",
    "PRI_jet_leading_pt",
    "PRI_jet_leading_eta",
    "PRI_jet_leading_phi",
    "PRI_jet_subleading_pt",
    "PRI_jet_subleading_eta",
    "PRI_jet_subleading_phi",
    "PRI_jet_all_pt",
)
"""Names of the 30 feature columns, in the order of the published files."""

LABEL = "Label"
"""Name of the column that holds the class of an event, ``"s"`` or ``"b"``."""

LABELS = ("b", "s")
"""The classes, background and signal; the position is the number a network learns."""

BOOKKEEPING = ("Weight", LABEL, "KaggleSet", "KaggleWeight")
"""Names of the columns after the features in CERN's file; the other files have fewer."""

MISSING = -999.0
"""Value of a feature that an event does not have."""

INTEGERS = (EVENT_ID, "PRI_jet_num")
"""Names of the columns that hold whole numbers."""

EXPECTED_SIGNAL, EXPECTED_BACKGROUND = 692.0, 411_000.0
"""How many events of each class the challenge expects in its data: the sums of the weights in
Kaggle's training file."""

SOURCE = "CERN Open Data record 328 (https://opendata.cern.ch/record/328)"
"""Where the published files are."""


def _spark_type(column: str) -> DataType:
    """Return the Spark type of `column`."""
    if column == EVENT_ID:
        return LongType()
    return IntegerType() if column in INTEGERS else DoubleType()


SCHEMA = StructType([StructField(name, _spark_type(name)) for name in (EVENT_ID, *FEATURES)])
"""Spark's description of an event as the stream carries it: its identifier and its features."""


# ----------------------------------------------------------------------------- reading files

# Kaggle's test file, the generator's events, Kaggle's training file, CERN's file.
_LAYOUTS = ((), (LABEL,), ("Weight", LABEL), BOOKKEEPING)


def read_events(path: str | PathLike[str]) -> pd.DataFrame:
    """Read a file of the Higgs boson challenge.

    Parameters
    ----------
    path : str or path-like
        A CSV file, plain or compressed (``.csv.gz``), with the columns of CERN's file (35), of
        Kaggle's training file (33), of Kaggle's test file (31, no classes) or of
        `generate_events` (32).

    Returns
    -------
    pandas.DataFrame
        One row per event. The columns are those of the file, in the published order: `EVENT_ID`
        (int64), the 30 `FEATURES` (float64 in GeV or radians, ``PRI_jet_num`` int64) and those
        `BOOKKEEPING` columns that the file has.

    Raises
    ------
    FileNotFoundError
        If there is no file at `path`.
    ValueError
        If a column is missing, unknown, or holds values that it cannot hold.

    References
    ----------
    The files: CERN Open Data record 328 [2]_.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "events.csv.gz")
    ...     generate_events(5, seed=1).to_csv(path, index=False)
    ...     read_events(path).shape
    (5, 32)
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no file {path}: download one from {SOURCE}, or write one with "
            "generate_events."
        )
    try:
        events = pd.read_csv(path)
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty: download it again from {SOURCE}.") from error
    layout = _layout_of(events.columns, path)
    for column in (EVENT_ID, *FEATURES):
        events[column] = _numbers(events[column], path)
    if LABEL in layout and not events[LABEL].isin(LABELS).all():
        raise ValueError(
            f"{path} has values other than s and b in the column {LABEL!r}: write s for signal "
            "and b for background."
        )
    return events[layout]


def read_events_in_spark(spark: SparkSession, path: str) -> DataFrame:
    """Read a file of the Higgs boson challenge with Spark, from any file system that it knows.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to read with.
    path : str
        As for `read_events`.

    Returns
    -------
    pyspark.sql.DataFrame
        As `read_events` returns them; an action fails if a value that it uses isn't what its
        column holds.

    Raises
    ------
    ValueError
        If a column is missing or unknown.

    Examples
    --------
    >>> path = str(getfixture("tmp_path") / "events.csv.gz")
    >>> generate_events(5, seed=1).to_csv(path, index=False)
    >>> read_events_in_spark(spark, path).select("EventId", "Label").first()
    Row(EventId=100000, Label='b')
    """
    header = spark.read.csv(path, header=True).columns
    layout = _layout_of(pd.Index(header), path)
    texts = (LABEL, "KaggleSet")
    types = [StringType() if name in texts else _spark_type(name) for name in header]
    schema = StructType([StructField(*column) for column in zip(header, types, strict=True)])
    # Each file's header is compared with the schema, for a path may be a folder of several.
    events = spark.read.csv(
        path, header=True, schema=schema, mode="FAILFAST", enforceSchema=False
    )
    return events.select(*[_checked(name, path).alias(name) for name in layout])


def _checked(name: str, path: str) -> Column:
    """Return a column of a published file, which fails where it has what `read_events` refuses."""
    column = F.col(name)
    if name == LABEL:
        fault, holds = "values other than s and b", column.isin(*LABELS)
    elif name in (EVENT_ID, *FEATURES):
        fault, holds = "values that are no numbers", column.isNotNull() & ~F.isnan(column)
    else:
        return column
    error = F.raise_error(F.lit(f"{path} has {fault} in the column {name!r}."))
    return F.when(holds, column).otherwise(error)


def significance(signal: ArrayLike, background: ArrayLike) -> NDArray[np.float64]:
    """Return the approximate median significance (AMS) of a selection of events.

    Parameters
    ----------
    signal, background : array_like
        The summed weights of the events of each class that are selected: how many of them the
        detector would see.

    Returns
    -------
    numpy.ndarray
        In standard deviations.

    References
    ----------
    The challenge's own measure, equation 7 of [1]_, with its regularisation of 10 events.

    Examples
    --------
    >>> significance([100.0, 200.0], 4_000.0).round(2).tolist()
    [1.57, 3.13]
    """
    signal, background = np.asarray(signal, float), np.asarray(background, float) + 10
    return np.sqrt(2 * ((signal + background) * np.log1p(signal / background) - signal))


def significance_curve(
    scores: ArrayLike, is_signal: ArrayLike, weights: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the AMS of selecting the events that score at least a threshold, for each threshold.

    Parameters
    ----------
    scores : array_like, shape (n,)
        The probability of signal that a network gives each event.
    is_signal : array_like of bool, shape (n,)
        What each event is.
    weights : array_like, shape (n,)
        How much each event counts for its class. They are scaled so that each class sums up to what
        the challenge expects of it, whatever part of its events is here.

    Returns
    -------
    thresholds, significances : numpy.ndarray
        The scores that occur, falling, and the AMS at each.

    Examples
    --------
    >>> thresholds, values = significance_curve([0.9, 0.2, 0.4], [True, True, False], [1, 1, 1])
    >>> thresholds.tolist(), values.round(1).tolist()
    ([0.9, 0.4, 0.2], [43.0, 0.5, 1.1])
    """
    order = np.argsort(scores)[::-1]
    scores, is_signal = np.asarray(scores)[order], np.asarray(is_signal, bool)[order]
    weights = np.asarray(weights, float)[order]
    selected = []
    for chosen, expected in ((is_signal, EXPECTED_SIGNAL), (~is_signal, EXPECTED_BACKGROUND)):
        sums = np.cumsum(np.where(chosen, weights, 0))
        selected.append(expected * sums / sums[-1])
    # Events of equal scores are selected together.
    last = np.append(np.diff(scores) != 0, True)
    return scores[last], significance(*selected)[last]


def _layout_of(header: pd.Index, path: str | PathLike[str]) -> list[str]:
    """Return the columns of the smallest layout with room for all of `header`."""
    for bookkeeping in _LAYOUTS:
        layout = [EVENT_ID, *FEATURES, *bookkeeping]
        if header.isin(layout).all():
            break
    unknown = [name for name in header if name not in layout]
    if unknown:
        raise ValueError(f"{path} has the unknown column {unknown[0]!r}: remove or rename it.")
    missing = [name for name in layout if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the column {missing[0]!r}: use a file with the columns of {SOURCE}."
        )
    return layout


def _numbers(values: pd.Series, path: str | PathLike[str]) -> pd.Series:
    """Return `values` as int64 or float64, whichever their column holds."""
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.isna().any():
        raise ValueError(
            f"{path} has values that are not numbers in the column {values.name!r}: "
            f"write {MISSING} where a value is missing."
        )
    if values.name not in INTEGERS:
        return numbers.astype("float64")
    if (numbers % 1 != 0).any():
        raise ValueError(
            f"{path} has fractions in the column {values.name!r}: write whole numbers there."
        )
    return numbers.astype("int64")


# ------------------------------------------------------------ derived columns, by definition


def transverse_mass(
    pt_1: ArrayLike, phi_1: ArrayLike, pt_2: ArrayLike, phi_2: ArrayLike
) -> NDArray[np.float64]:
    r"""Compute the transverse mass of two particles, :math:`\sqrt{2 p_1 p_2 (1 - \cos\Delta\phi)}`.

    Parameters
    ----------
    pt_1, pt_2 : array_like, shape (n,)
        Transverse momenta in GeV.
    phi_1, phi_2 : array_like, shape (n,)
        Azimuth angles in radians.

    Returns
    -------
    ndarray, shape (n,)
        Transverse mass in GeV.

    References
    ----------
    ``DER_mass_transverse_met_lep`` in the appendix of [1]_.

    Examples
    --------
    >>> float(transverse_mass(30.0, 0.0, 30.0, np.pi))
    60.0
    """
    return np.sqrt(2 * np.multiply(pt_1, pt_2) * (1 - np.cos(np.subtract(phi_1, phi_2))))


def invariant_mass(
    pt_1: ArrayLike,
    eta_1: ArrayLike,
    phi_1: ArrayLike,
    pt_2: ArrayLike,
    eta_2: ArrayLike,
    phi_2: ArrayLike,
) -> NDArray[np.float64]:
    r"""Compute the mass of two particles that have no mass themselves.

    The formula is :math:`\sqrt{2 p_1 p_2 (\cosh\Delta\eta - \cos\Delta\phi)}`. The published jets
    have a mass that no column tells, so ``DER_mass_jet_jet`` comes out a few GeV too small.

    Parameters
    ----------
    pt_1, pt_2 : array_like, shape (n,)
        Transverse momenta in GeV.
    eta_1, eta_2 : array_like, shape (n,)
        Pseudorapidities.
    phi_1, phi_2 : array_like, shape (n,)
        Azimuth angles in radians.

    Returns
    -------
    ndarray, shape (n,)
        Invariant mass in GeV.

    References
    ----------
    ``DER_mass_vis`` and ``DER_mass_jet_jet`` in the appendix of [1]_.

    Examples
    --------
    >>> float(invariant_mass(45.0, 1.0, 0.0, 45.0, 1.0, np.pi))
    90.0
    """
    delta_eta, delta_phi = np.subtract(eta_1, eta_2), np.subtract(phi_1, phi_2)
    return np.sqrt(2 * np.multiply(pt_1, pt_2) * (np.cosh(delta_eta) - np.cos(delta_phi)))


def angular_distance(
    eta_1: ArrayLike, phi_1: ArrayLike, eta_2: ArrayLike, phi_2: ArrayLike
) -> NDArray[np.float64]:
    r"""Compute the distance of two directions, :math:`\sqrt{\Delta\eta^2 + \Delta\phi^2}`.

    Parameters
    ----------
    eta_1, eta_2 : array_like, shape (n,)
        Pseudorapidities.
    phi_1, phi_2 : array_like, shape (n,)
        Azimuth angles in radians; their difference is taken the short way round the circle.

    Returns
    -------
    ndarray, shape (n,)
        Angular distance.

    References
    ----------
    ``DER_deltar_tau_lep`` in the appendix of [1]_.

    Examples
    --------
    >>> float(angular_distance(0.0, 3.0, 0.0, -3.0).round(3))
    0.283
    """
    return np.hypot(np.subtract(eta_1, eta_2), _wrap(np.subtract(phi_1, phi_2)))


def phi_centrality(phi: ArrayLike, phi_1: ArrayLike, phi_2: ArrayLike) -> NDArray[np.float64]:
    r"""Tell how centrally a direction lies between two others in the transverse plane.

    With :math:`A = \sin(\phi - \phi_1)` and :math:`B = \sin(\phi_2 - \phi)`, both multiplied by
    the sign of :math:`\sin(\phi_2 - \phi_1)`, the centrality is :math:`(A + B) / \sqrt{A^2 + B^2}`.

    Parameters
    ----------
    phi : array_like, shape (n,)
        Azimuth angle of the direction in radians.
    phi_1, phi_2 : array_like, shape (n,)
        Azimuth angles of the two others in radians.

    Returns
    -------
    ndarray, shape (n,)
        From :math:`\sqrt 2` in the middle of the two, over 1 on either, to :math:`-\sqrt 2`
        opposite; 0 where all three lie on one line, which leaves the middle undefined.

    References
    ----------
    ``DER_met_phi_centrality`` in the appendix of [1]_.

    Examples
    --------
    >>> phi_centrality(np.array([0.5, 1.0, 3.642]), 0.0, 1.0).round(3).tolist()
    [1.414, 1.0, -1.414]
    """
    orientation = np.sign(np.sin(np.subtract(phi_2, phi_1)))
    a = np.sin(np.subtract(phi, phi_1)) * orientation
    b = np.sin(np.subtract(phi_2, phi)) * orientation
    length = np.hypot(a, b)
    return np.divide(a + b, length, out=np.zeros_like(length), where=length > 0)


def eta_centrality(eta: ArrayLike, eta_1: ArrayLike, eta_2: ArrayLike) -> NDArray[np.float64]:
    r"""Tell how centrally a pseudorapidity lies between those of two jets.

    The formula is :math:`\exp(-4 (\eta - \bar\eta)^2 / (\eta_1 - \eta_2)^2)`, where
    :math:`\bar\eta` is the mean of the jets' pseudorapidities.

    Parameters
    ----------
    eta : array_like, shape (n,)
        Pseudorapidity.
    eta_1, eta_2 : array_like, shape (n,)
        Pseudorapidities of the jets.

    Returns
    -------
    ndarray, shape (n,)
        1 in the middle of the jets, 1/e on either, towards 0 outside.

    References
    ----------
    ``DER_lep_eta_centrality`` in the appendix of [1]_.

    Examples
    --------
    >>> eta_centrality(np.array([0.0, 2.0]), 2.0, -2.0).round(3).tolist()
    [1.0, 0.368]
    """
    middle, gap = np.add(eta_1, eta_2) / 2, np.subtract(eta_1, eta_2)
    # Jets at one pseudorapidity have nothing between them: a tiny gap gives the limit, not 0 / 0.
    return np.exp(-4 * ((eta - middle) / np.maximum(np.abs(gap), 1e-9)) ** 2)


class Particle(NamedTuple):
    """Momenta of one kind of particle, one entry per event."""

    pt: NDArray[np.float64]
    """Transverse momentum in GeV: the part across the beams."""
    eta: NDArray[np.float64]
    """Pseudorapidity: 0 across the beams, large along them."""
    phi: NDArray[np.float64]
    """Azimuth angle around the beams in radians."""


def derive_columns(events: pd.DataFrame) -> pd.DataFrame:
    """Compute the derived columns of events from their primitive columns.

    Parameters
    ----------
    events : pandas.DataFrame
        Events with all ``PRI_`` columns.

    Returns
    -------
    pandas.DataFrame
        A copy of `events` whose ``DER_`` columns hold their definitions' values, rounded to 3
        decimals as the published ones are, and `MISSING` where the event has too few jets. Only
        ``DER_mass_MMC`` is kept as it is: it comes from a likelihood, not from a formula.

    References
    ----------
    The ``DER_`` columns in the appendix of [1]_.

    Examples
    --------
    >>> events = generate_events(1000, seed=1)
    >>> derive_columns(events).equals(events)
    True
    """
    # NaN spreads through every formula: a result is missing where an input is.
    column = events.replace(MISSING, np.nan)
    tau, lep, leading, subleading = (
        Particle(*(column[f"PRI_{name}_{part}"].to_numpy() for part in Particle._fields))
        for name in ("tau", "lep", "jet_leading", "jet_subleading")
    )
    met, met_phi = column["PRI_met"].to_numpy(), column["PRI_met_phi"].to_numpy()
    higgs = _plane(tau.pt, tau.phi) + _plane(lep.pt, lep.phi) + _plane(met, met_phi)
    # Absent jets add nothing, and by definition neither do jets beyond these two.
    jets = sum(np.nan_to_num(_plane(jet.pt, jet.phi)) for jet in (leading, subleading))
    derived = {
        "DER_mass_transverse_met_lep": transverse_mass(lep.pt, lep.phi, met, met_phi),
        "DER_mass_vis": invariant_mass(*tau, *lep),
        "DER_pt_h": np.abs(higgs),
        "DER_deltaeta_jet_jet": np.abs(leading.eta - subleading.eta),
        "DER_mass_jet_jet": invariant_mass(*leading, *subleading),
        "DER_prodeta_jet_jet": leading.eta * subleading.eta,
        "DER_deltar_tau_lep": angular_distance(tau.eta, tau.phi, lep.eta, lep.phi),
        "DER_pt_tot": np.abs(higgs + jets),
        "DER_sum_pt": tau.pt + lep.pt + column["PRI_jet_all_pt"].to_numpy(),
        "DER_pt_ratio_lep_tau": lep.pt / tau.pt,
        "DER_met_phi_centrality": phi_centrality(met_phi, lep.phi, tau.phi),
        "DER_lep_eta_centrality": eta_centrality(lep.eta, leading.eta, subleading.eta),
    }
    return events.assign(
        **{name: np.nan_to_num(values.round(3), nan=MISSING) for name, values in derived.items()}
    )


def _plane(pt: NDArray[np.float64], phi: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Return transverse momenta as complex numbers: adding these adds the vectors."""
    return pt * np.exp(1j * phi)


def _wrap(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the same angle between -pi and pi."""
    return np.angle(np.exp(1j * angle))


# ------------------------------------------------------------------------- generating events


class Process(NamedTuple):
    """What the generator knows about one kind of collision; energies are in GeV.

    References
    ----------
    The kinds of collision: section "The data" of [1]_. The numbers are adjusted to the first
    6,000 events of [2]_, whose weights suggest the kind of each.
    """

    label: str
    """Class of the events, ``"s"`` or ``"b"``."""
    share: float
    """Part of the class's events."""
    mass: float
    """Mass of the boson that decays."""
    rapidity: float
    """Spread of the boson's rapidity, its motion along the beams."""
    jet_shares: tuple[float, float, float, float]
    """Part of the events with 0, 1, 2 and 3 jets."""
    jet_pt: float
    """Mean pt of a lone jet above the threshold `JET_PT`."""
    jet_gap: tuple[float, float]
    """Mean and spread of the difference between the two leading jets' pseudorapidities."""
    soft_pt: float
    """Mean pt of everything that is too soft to be a jet."""
    jet_growth: float = 0.0
    """Part by which each further jet raises the jets' mean pt."""
    unseen_pt: float = 0.0
    """Mean pt of neutrinos that do not come from the boson."""
    other_tau_pt: float = 0.0
    """Mean pt above the threshold `TAU_PT` of a tau that does not come from the boson.

    If it is 0, the boson decays to two taus, one of which decays to the lepton; otherwise the
    boson is a W that decays to the lepton and a neutrino.
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
"""Part of the events that are signal."""

TAU_PT, LEP_PT, JET_PT = 20.0, 26.0, 30.0
"""Thresholds in GeV from which the detector's data holds a tau, a lepton and a jet."""

TAU_LEP_ETA, JET_ETA = 2.5, 4.5
"""Largest pseudorapidities of taus and leptons, and of jets."""

TAU_LEP_DISTANCE = 0.2
"""Smallest angular distance between the tau and the lepton."""

JET_MIDDLE = 1.2
"""Spread of the pseudorapidity midway between the jets."""

JET_GAP_LIMIT = 7.0
"""Largest difference of the jets' pseudorapidities."""

RAPIDITY_PULL = 0.4
"""Part of the jets' pseudorapidity that the boson shares."""

OTHER_TAU_SPREAD = 1.3
"""Spread between the rapidities of the boson and of a tau that does not come from it."""

FURTHER_JETS = 0.4
"""Mean number of jets beyond the third."""

HADRONIC_PART, LEPTONIC_PART = (2.5, 1.6), (1.1, 2.0)
"""Beta distributions of the part of a tau's momentum that its neutrinos leave, in the decays that
are seen as a tau and as a lepton."""

SOFT_RESPONSE, TAU_LEP_RESPONSE = 0.4, 0.84
"""Parts of the soft momentum, and of the energy of tau and lepton, that the detector measures."""

SOFT_ENERGY = (1.5, 41.0)
"""Gamma distribution (shape, scale in GeV) of the energy that belongs to no jet, tau or lepton."""

NOISE = 0.85
"""Mean error of the missing momentum, in units of the square root of the summed energy."""

MMC_SCALE, MMC_SLOPE, MMC_ERROR = 1.28, 0.35, 0.11
"""Scale, dependence on missing momentum, and relative error of the modelled MMC mass."""

MMC_LIMIT, MMC_STEEPNESS = 88.0, 5.3
"""Misdirected missing momentum in GeV from which half the events lack a mass, and how sharply."""


def generate_events(n: int, seed: int = 0, first_event_id: int = 100_000) -> pd.DataFrame:
    """Draw events that resemble those of the challenge.

    The model is a sketch of the physics. A boson recoils against up to three jets and softer
    particles; it decays to a tau and a lepton, and neutrinos carry momentum away; or the tau comes
    from elsewhere. The detector measures soft particles poorly and loses low momenta. Every
    derived column follows from the drawn primitive ones by `derive_columns`, except
    ``DER_mass_MMC``: that is the result of a likelihood calculation without a closed formula, so
    it is drawn around a formula fitted to the published events, and is missing at random with a
    fitted probability.

    For each column and class, mean and spread agree with the published events within 25 % (the
    mean within 25 % of the spread where values have both signs), and the share of missing values
    within 0.05. Correlations and tails agree less: use these events to learn and to test programs,
    never for physics.

    Parameters
    ----------
    n : int
        Number of events.
    seed : int, default 0
        Seed of the random numbers: the same arguments give the same events.
    first_event_id : int, default 100000
        Identifier of the first event; the others count on from it.

    Returns
    -------
    pandas.DataFrame, shape (n, 32)
        `EVENT_ID`, the 30 `FEATURES` and `LABEL`, of which 34 % are signal. Momenta, masses and
        energies are in GeV, angles in radians, all rounded to 3 decimals.

    Raises
    ------
    ValueError
        If `n` is negative.

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
    class_shares = {"s": SIGNAL_SHARE, "b": 1 - SIGNAL_SHARE}
    shares = [process.share * class_shares[process.label] for process in PROCESSES]
    kinds = generator.choice(len(PROCESSES), size=n, p=shares)
    parts = []
    for kind, process in enumerate(PROCESSES):
        rows = np.flatnonzero(kinds == kind)
        primitives = _draw_primitives(generator, process, len(rows))
        parts.append(pd.DataFrame(primitives, index=rows).assign(**{LABEL: process.label}))
    # Rounding comes first, so that the columns of the finished event agree with each other.
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
    # The rest of the summed energy is that of soft particles, whatever their direction.
    summed = (
        columns["PRI_jet_all_pt"]
        + TAU_LEP_RESPONSE * (tau.pt + lep.pt)
        + generator.gamma(*SOFT_ENERGY, n)
    )
    noise = _draw_plane(generator, NOISE * np.sqrt(summed), n)
    seen = jets + SOFT_RESPONSE * soft + _plane(tau.pt, tau.phi) + _plane(lep.pt, lep.phi)
    missing = noise - seen
    columns["PRI_met"] = np.abs(missing)
    columns["PRI_met_phi"] = np.angle(missing)
    columns["PRI_met_sumet"] = summed
    for name, particle in {"tau": tau, "lep": lep}.items():
        for part, values in particle._asdict().items():
            columns[f"PRI_{name}_{part}"] = values
    return columns


def _draw_plane(generator: Generator, mean: ArrayLike, n: int) -> NDArray[np.complex128]:
    """Draw `n` transverse momenta of exponential size around `mean` in any direction."""
    return _plane(generator.exponential(mean, n), generator.uniform(-np.pi, np.pi, n))


def _draw_jets(
    generator: Generator, process: Process, n: int
) -> tuple[dict[str, NDArray], NDArray[np.complex128], NDArray[np.float64]]:
    """Draw the jets' columns, total transverse momentum and middle pseudorapidity."""
    number = generator.choice(4, size=n, p=process.jet_shares)
    is_there = np.arange(3)[:, np.newaxis] < number
    mean = process.jet_pt * (1 + process.jet_growth * (number - 1))
    # The leading jet comes first, and the zeros of absent jets last.
    excess = np.sort(generator.exponential(mean, (3, n)) * is_there, axis=0)[::-1]
    pt = (JET_PT + excess) * is_there
    # The published number of jets stops at three: the third stands for the further ones too.
    pt[2] *= 1 + generator.poisson(FURTHER_JETS, n)
    eta = _draw_jet_eta(generator, process, n)
    phi = generator.uniform(-np.pi, np.pi, (3, n))
    # The second jet balances the first a little: a power below 1 favours the opposite side.
    turn = np.pi * generator.random(n) ** 0.8 * generator.choice((-1, 1), n)
    phi[1] = _wrap(phi[0] + turn)
    columns = {"PRI_jet_num": number, "PRI_jet_all_pt": pt.sum(axis=0)}
    for row, name in enumerate(("leading", "subleading")):
        for part, values in (("pt", pt), ("eta", eta), ("phi", phi)):
            columns[f"PRI_jet_{name}_{part}"] = np.where(is_there[row], values[row], MISSING)
    return columns, _plane(pt, phi).sum(axis=0), eta.mean(axis=0)


def _draw_jet_eta(generator: Generator, process: Process, n: int) -> NDArray[np.float64]:
    """Draw the pseudorapidities of `n` pairs of jets, shape (2, n)."""
    mean, spread = np.divide(process.jet_gap, JET_GAP_LIMIT)
    # The parameters of the beta distribution between 0 and 1 with this mean and spread.
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
    """Draw a tau and a lepton for each recoil, again and again until the detector keeps both."""
    tau, lep = np.empty((2, 3, len(recoil)))
    rows = np.arange(len(recoil))
    while len(rows):
        drawn = _draw_decay(generator, process, recoil[rows], jet_middle[rows])
        tau[:, rows], lep[:, rows] = drawn
        rows = rows[~_is_kept(*drawn)]
    return Particle(*tau), Particle(*lep)


def _is_kept(tau: Particle, lep: Particle) -> NDArray[np.bool_]:
    """Tell which pairs the detector keeps."""
    return (
        (tau.pt > TAU_PT)
        & (lep.pt > LEP_PT)
        & (np.abs(tau.eta) < TAU_LEP_ETA)
        & (np.abs(lep.eta) < TAU_LEP_ETA)
        & (angular_distance(tau.eta, tau.phi, lep.eta, lep.phi) > TAU_LEP_DISTANCE)
    )


def _draw_decay(
    generator: Generator,
    process: Process,
    recoil: NDArray[np.complex128],
    jet_middle: NDArray[np.float64],
) -> tuple[Particle, Particle]:
    """Draw a tau and a lepton for each recoil, wherever they go."""
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
        lep, _ = _split(generator, process.mass, boson - _plane(tau.pt, tau.phi), rapidity)
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
    """Let bosons decay to two massless particles, which fly apart in any direction."""
    n = len(transverse)
    transverse_energy = np.hypot(mass, np.abs(transverse))
    energy = transverse_energy * np.cosh(rapidity)
    boson = np.array([transverse.real, transverse.imag, transverse_energy * np.sinh(rapidity)])
    cosine = generator.uniform(-1, 1, n)
    across = _plane(np.sqrt(1 - cosine**2), generator.uniform(-np.pi, np.pi, n))
    # For the boson at rest each particle has half the mass as energy; the Lorentz transformation
    # then lets the pair move with the boson.
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
    """Draw the MMC mass of events around a fit, and tell where it has no solution."""
    met = events["PRI_met"]
    visible_pt = events["PRI_tau_pt"] + events["PRI_lep_pt"]
    error = generator.normal(0, MMC_ERROR, len(events))
    mass = MMC_SCALE * events["DER_mass_vis"] * np.exp(MMC_SLOPE * met / visible_pt + error)
    tau = _plane(events["PRI_tau_pt"], events["PRI_tau_phi"])
    lep = _plane(events["PRI_lep_pt"], events["PRI_lep_phi"])
    # A tau's neutrinos fly along with it: momentum missing in other directions has other causes.
    astray = met * (1 - np.cos(events["PRI_met_phi"] - np.angle(tau + lep)))
    solution_share = 1 / (1 + (astray / MMC_LIMIT) ** MMC_STEEPNESS)
    return mass.round(3).where(generator.random(len(events)) < solution_share, MISSING)
