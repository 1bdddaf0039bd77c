"""The columns of a Higgs boson challenge event."""

from __future__ import annotations

from pyspark.sql.types import (
    DataType,
    DoubleType,
    IntegerType,
    LongType,
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
"""Name of the column with the class of an event, ``"s"`` or ``"b"``."""

LABELS = ("b", "s")
"""The classes, background and signal; a class's index is the number that a network learns."""

BOOKKEEPING = ("Weight", LABEL, "KaggleSet", "KaggleWeight")
"""Names of the columns that follow the features in CERN's file; other files have fewer."""

MISSING = -999.0
"""Value of a feature that is not defined for an event."""

INTEGERS = (EVENT_ID, "PRI_jet_num")
"""Names of the columns of whole numbers."""

SOURCE = "CERN Open Data record 328 (https://opendata.cern.ch/record/328)"
"""Source of the published files."""


def spark_type(column: str) -> DataType:
    """Return the Spark type of `column`."""
    if column == EVENT_ID:
        return LongType()
    return IntegerType() if column in INTEGERS else DoubleType()


SCHEMA = StructType([StructField(name, spark_type(name)) for name in (EVENT_ID, *FEATURES)])
"""Spark schema of an event in the stream: its identifier and its features."""
