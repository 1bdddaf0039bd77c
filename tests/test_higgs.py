"""The Higgs events that the tutorial sends, scores and plots."""

import gzip
import io
import lzma
import sys
import zipfile
from functools import partial

import keras
import numpy as np
import pandas as pd
import pytest
import zstandard

from helpers import higgs

# Mean and spread, both without missing values, and share of missing values of each feature, for
# signal and for background, in the first 6,000 events of CERN Open Data record 328.
PUBLISHED = {
    "DER_mass_MMC": ((122.89, 27.139, 0.030), (119.80, 66.036, 0.212)),
    "DER_mass_transverse_met_lep": ((32.725, 29.192, 0), (57.945, 34.180, 0)),
    "DER_mass_vis": ((80.325, 20.225, 0), (80.881, 45.161, 0)),
    "DER_pt_h": ((72.746, 70.943, 0), (47.912, 54.167, 0)),
    "DER_deltaeta_jet_jet": ((3.0053, 1.9806, 0.627), (1.9054, 1.3622, 0.756)),
    "DER_mass_jet_jet": ((510.24, 515.44, 0.627), (256.61, 231.24, 0.756)),
    "DER_prodeta_jet_jet": ((-1.9356, 4.2462, 0.627), (0.0671, 2.7703, 0.756)),
    "DER_deltar_tau_lep": ((2.4008, 0.6756, 0), (2.3608, 0.8162, 0)),
    "DER_pt_tot": ((18.088, 20.668, 0), (18.961, 21.502, 0)),
    "DER_sum_pt": ((179.94, 117.67, 0), (144.45, 110.01, 0)),
    "DER_pt_ratio_lep_tau": ((1.1903, 0.7227, 0), (1.5464, 0.8292, 0)),
    "DER_met_phi_centrality": ((0.3095, 1.1796, 0), (-0.3647, 1.1241, 0)),
    "DER_lep_eta_centrality": ((0.5988, 0.3912, 0.627), (0.3610, 0.3760, 0.756)),
    "PRI_tau_pt": ((45.443, 23.461, 0), (34.934, 19.320, 0)),
    "PRI_tau_eta": ((-0.0194, 1.0978, 0), (-0.0412, 1.2749, 0)),
    "PRI_tau_phi": ((0.0154, 1.8154, 0), (-0.0072, 1.8113, 0)),
    "PRI_lep_pt": ((45.052, 19.855, 0), (46.864, 21.276, 0)),
    "PRI_lep_eta": ((-0.0032, 1.1139, 0), (-0.0295, 1.3339, 0)),
    "PRI_lep_phi": ((0.0292, 1.8005, 0), (0.0341, 1.8117, 0)),
    "PRI_met": ((42.069, 37.947, 0), (40.511, 28.099, 0)),
    "PRI_met_phi": ((-0.0605, 1.8185, 0), (-0.0057, 1.8204, 0)),
    "PRI_met_sumet": ((230.28, 124.18, 0), (196.13, 124.35, 0)),
    "PRI_jet_num": ((1.1385, 0.9442, 0), (0.8775, 0.9926, 0)),
    "PRI_jet_leading_pt": ((92.293, 63.447, 0.310), (78.954, 56.119, 0.464)),
    "PRI_jet_leading_eta": ((0.0056, 1.9758, 0.310), (-0.0083, 1.6267, 0.464)),
    "PRI_jet_leading_phi": ((-0.0086, 1.7917, 0.310), (-0.0158, 1.7957, 0.464)),
    "PRI_jet_subleading_pt": ((55.622, 26.735, 0.627), (58.552, 35.163, 0.756)),
    "PRI_jet_subleading_eta": ((0.0440, 2.2743, 0.627), (-0.0378, 1.7834, 0.756)),
    "PRI_jet_subleading_phi": ((0.0195, 1.7822, 0.627), (-0.0201, 1.8456, 0.756)),
    "PRI_jet_all_pt": ((89.442, 99.363, 0), (62.651, 95.669, 0)),
}

# Features with values of both signs: their means are near zero compared with their spread.
SIGNED = [name for name in PUBLISHED if name.endswith(("_eta", "_phi"))] + [
    "DER_prodeta_jet_jet",
    "DER_met_phi_centrality",
]

LEADING = {"PRI_jet_leading_pt", "PRI_jet_leading_eta", "PRI_jet_leading_phi"}
SUBLEADING = {
    "PRI_jet_subleading_pt",
    "PRI_jet_subleading_eta",
    "PRI_jet_subleading_phi",
    "DER_deltaeta_jet_jet",
    "DER_mass_jet_jet",
    "DER_prodeta_jet_jet",
    "DER_lep_eta_centrality",
}


@pytest.fixture(scope="module")
def events():
    """The events that most tests use."""
    return higgs.generate_events(20_000, seed=2014)


@pytest.fixture
def cern_table(events):
    """A few events with all columns of CERN's file."""
    few = events.head(50).copy()
    few.insert(31, "Weight", 0.5)
    return few.assign(KaggleSet="t", KaggleWeight=1.5)


def test_features_are_those_of_the_published_files():
    """The features have the names and the order of the published files."""
    assert tuple(PUBLISHED) == higgs.FEATURES
    assert len(higgs.FEATURES) == 30


def test_schema_names_and_types_every_column_of_an_event():
    """The id is a long, the jet number an integer, and every other column a double."""
    types = {field.name: field.dataType.typeName() for field in higgs.SCHEMA}
    assert list(types) == ["EventId", *higgs.FEATURES]
    assert types.pop("EventId") == "long"
    assert types.pop("PRI_jet_num") == "integer"
    assert set(types.values()) == {"double"}


@pytest.mark.parametrize(
    "absent",
    [
        pytest.param([], id="CERN, 35 columns"),
        pytest.param(["KaggleSet", "KaggleWeight"], id="Kaggle training, 33 columns"),
        pytest.param(["Weight", "KaggleSet", "KaggleWeight"], id="generated, 32 columns"),
        pytest.param(list(higgs.BOOKKEEPING), id="Kaggle test, 31 columns"),
    ],
)
@pytest.mark.parametrize("name", ["events.csv", "events.csv.gz"])
def test_read_events_returns_what_the_file_holds(cern_table, tmp_path, absent, name):
    """A published file is read with all its columns and values, compressed or not."""
    written = cern_table.drop(columns=absent)
    written.to_csv(tmp_path / name, index=False)
    pd.testing.assert_frame_equal(higgs.read_events(tmp_path / name), written)


def test_read_events_finds_columns_by_name(cern_table, tmp_path):
    """Columns are found by name, whatever their order in the file."""
    cern_table[cern_table.columns[::-1]].to_csv(tmp_path / "events.csv", index=False)
    pd.testing.assert_frame_equal(higgs.read_events(tmp_path / "events.csv"), cern_table)


def test_read_events_keeps_whole_numbers_whole(cern_table, tmp_path):
    """Ids and jet numbers written as 2.0 are read as integers."""
    cern_table.astype({"EventId": float, "PRI_jet_num": float}).to_csv(
        tmp_path / "events.csv", index=False
    )
    read = higgs.read_events(tmp_path / "events.csv")
    assert read[list(higgs.INTEGERS)].dtypes.eq("int64").all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="PRI_met"), "lacks the column 'PRI_met': use a file with"),
        (lambda t: t.drop(columns="KaggleSet"), "lacks the column 'KaggleSet': use a file with"),
        (lambda t: t.assign(speed=1), "has the unknown column 'speed': remove or rename it"),
        (lambda t: t.assign(PRI_met="high"), "not numbers in the column 'PRI_met': write -999.0"),
        (lambda t: t.assign(PRI_met=np.nan), "not numbers in the column 'PRI_met': write -999.0"),
        (lambda t: t.assign(PRI_jet_num=1.5), "fractions in the column 'PRI_jet_num': write whole"),
        (lambda t: t.assign(Label="signal"), "other than s and b in the column 'Label': write s"),
    ],
)
def test_read_events_says_what_is_wrong_with_a_file(cern_table, tmp_path, spoil, message):
    """A malformed file is refused with its name, the faulty column and the remedy."""
    path = tmp_path / "events.csv"
    spoil(cern_table).to_csv(path, index=False)
    with pytest.raises(ValueError, match=message) as error:
        higgs.read_events(path)
    assert str(path) in str(error.value)


def test_read_events_says_that_a_file_is_empty(tmp_path):
    """An empty file is refused, and the message says to download it again."""
    path = tmp_path / "events.csv"
    path.touch()
    with pytest.raises(ValueError, match="is empty: download it again from CERN Open Data"):
        higgs.read_events(path)


def test_read_events_says_where_to_get_a_missing_file(tmp_path):
    """The error for a missing file names CERN's record and `generate_events`."""
    with pytest.raises(FileNotFoundError, match=r"CERN Open Data record 328.*generate_events"):
        higgs.read_events(tmp_path / "events.csv")


def test_one_seed_gives_the_same_events_and_another_gives_others():
    """A seed determines the events, and another seed gives different events."""
    first = higgs.generate_events(200, seed=7)
    pd.testing.assert_frame_equal(first, higgs.generate_events(200, seed=7))
    assert not first.equals(higgs.generate_events(200, seed=8))


def test_event_identifiers_are_distinct_and_start_where_asked():
    """Event ids are consecutive and start at the given id."""
    identifiers = higgs.generate_events(200, first_event_id=350_000)["EventId"]
    assert identifiers.tolist() == list(range(350_000, 350_200))


@pytest.mark.parametrize("n", [0, 1, 7])
def test_few_events_have_the_columns_of_many(events, n):
    """A few events, or none, have the same columns and types as many."""
    few = higgs.generate_events(n)
    assert len(few) == n
    assert list(few) == ["EventId", *higgs.FEATURES, "Label"]
    assert few.dtypes.equals(events.dtypes)


def test_generated_columns_have_the_published_types(events):
    """Generated columns have the file's types, and finite values with three decimals."""
    assert events[list(higgs.INTEGERS)].dtypes.eq("int64").all()
    assert events[list(higgs.FEATURES)].drop(columns="PRI_jet_num").dtypes.eq("float64").all()
    assert np.isfinite(events[list(higgs.FEATURES)]).all(axis=None)
    assert events.equals(events.round(3))


def test_derived_columns_match_an_event_computed_by_hand():
    """Derived columns follow the challenge's definitions, as computed by hand."""
    event = {
        "DER_mass_MMC": 125.0,
        "PRI_tau_pt": 40.0,
        "PRI_tau_eta": 0.0,
        "PRI_tau_phi": 0.0,
        "PRI_lep_pt": 30.0,
        "PRI_lep_eta": 0.0,
        "PRI_lep_phi": np.pi / 2,
        "PRI_met": 50.0,
        "PRI_met_phi": np.pi,
        "PRI_jet_num": 3,
        "PRI_jet_leading_pt": 100.0,
        "PRI_jet_leading_eta": 2.0,
        "PRI_jet_leading_phi": -np.pi / 2,
        "PRI_jet_subleading_pt": 60.0,
        "PRI_jet_subleading_eta": -1.0,
        "PRI_jet_subleading_phi": 0.0,
        "PRI_jet_all_pt": 195.0,
    }
    derived = higgs.derive_columns(pd.DataFrame([event])).iloc[0]
    by_hand = {
        "DER_mass_MMC": 125.0,  # not derived, so it stays
        "DER_mass_transverse_met_lep": 54.772,  # sqrt(2 * 30 * 50 * (1 - cos 90 degrees))
        "DER_mass_vis": 48.990,  # sqrt(2 * 40 * 30 * (cosh 0 - cos 90 degrees))
        "DER_pt_h": 31.623,  # (40, 0) + (0, 30) + (-50, 0) = (-10, 30)
        "DER_deltaeta_jet_jet": 3.0,
        "DER_mass_jet_jet": 347.580,  # sqrt(2 * 100 * 60 * (cosh 3 - cos 90 degrees))
        "DER_prodeta_jet_jet": -2.0,
        "DER_deltar_tau_lep": 1.571,  # 90 degrees
        "DER_pt_tot": 86.023,  # (-10, 30) + (0, -100) + (60, 0) = (50, -70)
        "DER_sum_pt": 265.0,  # 40 + 30 + 195
        "DER_pt_ratio_lep_tau": 0.75,
        "DER_met_phi_centrality": -1.0,  # opposite to the tau, so A = -1 and B = 0
        "DER_lep_eta_centrality": 0.895,  # exp(-4 * 0.5 ** 2 / 3 ** 2)
    }
    assert derived[list(by_hand)].to_dict() == by_hand


@pytest.mark.parametrize("absent", ["PRI_met_phi", "PRI_tau_phi", "PRI_tau_pt"])
def test_what_follows_from_a_missing_value_is_missing(events, absent):
    """No derived column has a number that looks measured if what it depends on is missing."""
    derived = higgs.derive_columns(events.assign(**{absent: higgs.MISSING}))
    name = "DER_pt_ratio_lep_tau" if absent == "PRI_tau_pt" else "DER_met_phi_centrality"
    assert (derived[name] == higgs.MISSING).all()
    nothing = higgs.derive_columns(events.assign(PRI_tau_pt=0.0))
    assert (nothing["DER_pt_ratio_lep_tau"] == higgs.MISSING).all()


def test_generated_derived_columns_follow_their_definitions(events):
    """Generated derived columns equal those computed from the primary columns."""
    pd.testing.assert_frame_equal(higgs.derive_columns(events), events)


@pytest.mark.parametrize(
    ("jets", "absent"), [(0, LEADING | SUBLEADING), (1, SUBLEADING), (2, set()), (3, set())]
)
def test_features_of_absent_jets_are_missing(events, jets, absent):
    """A feature is missing exactly if it describes a jet that the event doesn't have."""
    selected = events[events["PRI_jet_num"] == jets].drop(columns="DER_mass_MMC")
    missing = selected == higgs.MISSING
    assert set(missing.columns[missing.any()]) == absent
    assert set(missing.columns[missing.all()]) == absent


def test_generated_events_pass_the_detectors_cuts(events):
    """Generated particles satisfy the detector's cuts on momentum and angle."""
    assert events["PRI_tau_pt"].ge(20).all()
    assert events["PRI_lep_pt"].ge(26).all()
    assert events[["PRI_tau_eta", "PRI_lep_eta"]].abs().le(2.5).all(axis=None)
    two_jets = events[events["PRI_jet_num"] >= 2]
    assert two_jets["PRI_jet_leading_pt"].ge(two_jets["PRI_jet_subleading_pt"]).all()
    present = events.where(events != higgs.MISSING)
    assert present[["PRI_jet_leading_pt", "PRI_jet_subleading_pt"]].min().min() >= 30
    assert present[["PRI_jet_leading_eta", "PRI_jet_subleading_eta"]].abs().max().max() <= 4.5
    angles = [name for name in higgs.FEATURES if name.startswith("PRI_") and name.endswith("_phi")]
    assert present[angles].abs().max().max() <= 3.142


def test_jet_sum_adds_up_the_jets(events):
    """`PRI_jet_all_pt` is the sum of the listed jets, and more only with a third jet."""
    named = events[["PRI_jet_leading_pt", "PRI_jet_subleading_pt"]]
    further = events["PRI_jet_all_pt"] - named.where(named != higgs.MISSING, 0).sum(axis=1)
    has_further = events["PRI_jet_num"] == 3
    assert further[~has_further].abs().lt(0.002).all()
    assert further[has_further].ge(29.998).all()


def test_a_third_of_the_events_is_signal(events):
    """About 34 % of the generated events are signal, as in the challenge."""
    assert set(events["Label"]) == set(higgs.LABELS)
    assert (events["Label"] == "s").mean() == pytest.approx(0.34, abs=0.015)


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_another_share_of_signal_can_be_generated(share):
    """The given fraction of the events is signal; the ends of the range are allowed."""
    labels = higgs.generate_events(2_000, signal_share=share)["Label"]
    assert (labels == "s").mean() == pytest.approx(share, abs=0.03)


def test_a_share_beyond_one_is_refused():
    """A share of signal above 1 is an error."""
    with pytest.raises(ValueError, match="Probabilities"):
        higgs.generate_events(10, signal_share=1.5)


@pytest.mark.parametrize("label", ["s", "b"])
@pytest.mark.parametrize("feature", PUBLISHED)
def test_generated_feature_resembles_the_published_one(events, feature, label):
    """Each feature's mean, spread and share of missing values are close to the file's."""
    mean, spread, missing_share = PUBLISHED[feature]["sb".index(label)]
    values = events.loc[events["Label"] == label, feature].replace(higgs.MISSING, np.nan)
    assert values.mean() == pytest.approx(
        mean, abs=0.25 * (spread if feature in SIGNED else abs(mean))
    )
    assert values.std() == pytest.approx(spread, rel=0.25)
    assert values.isna().mean() == pytest.approx(missing_share, abs=0.05)


def test_a_network_tells_the_classes_apart_as_well_as_on_published_events(events):
    """A small network separates the classes with an AUC between 0.85 and 0.95."""
    keras.utils.set_random_seed(0)
    features = events[list(higgs.FEATURES)].to_numpy()
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    is_signal = (events["Label"] == "s").to_numpy(dtype="float32")
    network = keras.Sequential(
        [
            keras.layers.Dense(50, activation="relu"),
            keras.layers.Dense(20, activation="relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    network.compile(optimizer="adam", loss="binary_crossentropy", metrics=[keras.metrics.AUC()])
    training, test = slice(0, 14_000), slice(14_000, None)
    network.fit(features[training], is_signal[training], epochs=10, batch_size=128, verbose=0)
    _, auc = network.evaluate(features[test], is_signal[test], verbose=0)
    assert 0.85 < auc < 0.95


HEADER = ",".join(["EventId", *higgs.FEATURES, "Label"])
ROW = ",".join(["100000", *["1.5"] * 22, "2", *["0.1"] * 7, "s"])
TEXT = f"{HEADER}\n{ROW}\n"


def with_value(column, value):
    """Return a file of two events, one with another value."""
    row = ROW.split(",")
    row[HEADER.split(",").index(column)] = value
    return f"{TEXT}{','.join(row)}\n"


def zipped(*texts, **more):
    """Return a ZIP archive with a file for each text, and others by their names."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for number, text in enumerate(texts):
            archive.writestr(f"{number}.csv", text)
        for name, text in more.items():
            archive.writestr(name, text)
    return content.getvalue()


CERN = higgs.generate_events(12_000, seed=1).assign(KaggleSet="t", KaggleWeight=1.5)
CERN.insert(31, "Weight", 0.5)
CERN_TEXT = CERN.to_csv(index=False)

ACCEPTED = {
    "plain": ("events.csv", CERN_TEXT),
    "gzip": ("events.csv.gz", gzip.compress(CERN_TEXT.encode())),
    "zip": ("events.ZIP", zipped(TEXT)),
    "zip of a folder": (
        "events.zip",
        zipped(TEXT, **{"data/": "", "__MACOSX/._0.csv": "\0", "data/.DS_Store": "\0"}),
    ),
    "gzip, renamed": ("events.csv.gz.1", gzip.compress(TEXT.encode())),
    "gzip, already unpacked": ("events.csv.gz", TEXT),
    "xz": ("events.csv.xz", lzma.compress(TEXT.encode())),
    "Zstandard": ("events.csv.zst", zstandard.compress(TEXT.encode())),
    "Zstandard with a comment": (
        "events.csv.zst", b"\x50\x2a\x4d\x18\x02\0\0\0ab" + zstandard.compress(TEXT.encode()),
    ),
    "Kaggle": ("events.csv", CERN[:9][CERN.columns[:33]].to_csv(index=False)),
    "another order": ("events.csv", CERN[CERN.columns[::-1]].head(5).to_csv(index=False)),
    "an odd path": ("a [1]{b}*?\\,%20#:ü.csv", TEXT),
    "a hidden file": ("_events.csv", TEXT),
    "a header alone": ("events.csv", HEADER),
    "a float id": ("events.csv", with_value("EventId", "100001.0")),
    "an exponent": ("events.csv", with_value("EventId", "1e5")),
    "a large id": ("events.csv", with_value("EventId", str(2**63 - 1))),
    "a byte-order mark": ("events.csv", f"\ufeff{TEXT}"),
    "quotes": ("events.csv", "".join(f'"{field}",' for field in HEADER.split(","))[:-1]
               + "\n" + "".join(f'"{field}",' for field in ROW.split(","))[:-1]),
    "CRLF": ("events.csv", TEXT.replace("\n", "\r\n")),
    "blank lines": ("events.csv", "\n\n" + TEXT.replace("\n", "\n\n")),
    "blanks": ("events.csv", with_value("PRI_met", " 7.5")),
    "seventeen digits": ("events.csv", with_value("PRI_met", "0.30000000000000004")),
}  # fmt: skip


@pytest.mark.parametrize("name, content", ACCEPTED.values(), ids=ACCEPTED)
def test_pandas_and_spark_read_the_same_files(spark, tmp_path, name, content):
    """Both readers accept the same files, and give the same values in the same order."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    in_pandas, in_spark = higgs.read_events(path), higgs.read_events_in_spark(spark, path)
    assert in_pandas["EventId"].dtype == "int64"
    assert dict(in_spark.dtypes)["EventId"] == "bigint"
    pd.testing.assert_frame_equal(
        in_spark.toPandas(), in_pandas, check_dtype=False, check_exact=True
    )


def test_numbers_are_read_exactly(tmp_path):
    """An id keeps all its digits, and a feature is the float that is nearest to its text."""
    path = tmp_path / "events.csv"
    path.write_text(with_value("EventId", str(2**63 - 1)))
    assert higgs.read_events(path)["EventId"].tolist() == [100_000, 2**63 - 1]
    path.write_text(with_value("PRI_met", "0.30000000000000004"))
    assert higgs.read_events(path)["PRI_met"].tolist() == [1.5, 0.30000000000000004]


def zstandard_block(text):
    """Return the first block of a compressed text, which more could follow."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(text.encode()) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


REFUSED = {
    "nothing": ("events.csv", "", "is empty: download it again from CERN Open Data"),
    "blank lines": ("events.csv", "\n \n\n", "is empty: download it again"),
    "no header": ("events.csv", ROW, "has the unknown column '100000'"),
    "semicolons": ("events.csv", TEXT.replace(",", ";"), "write them with commas"),
    "a missing column": ("events.csv", "EventId,Label\n1,s\n", "lacks the column 'DER_mass_MMC'"),
    "another column": ("events.csv", f"{HEADER},speed\n{ROW},1\n", "the unknown column 'speed'"),
    "a column twice": ("events.csv", f"{HEADER},Label\n{ROW},s\n", "unknown column 'Label.1'"),
    "too few values": ("events.csv", f"{TEXT}1,2,3\n", "not numbers in the column 'DER_mass_vis'"),
    "too many values": ("events.csv", f"{TEXT}{ROW},1\n", "rows with more values than columns"),
    "far too many": ("events.csv", f"{TEXT}{ROW}{',1' * 9}\n", r"be read as CSV \(.*saw 41\)"),
    "a chunk that begins too long": (
        "events.csv", f"{HEADER}\n" + f"{ROW}\n" * 10_000 + f"{ROW},497\n", "rows with more values",
    ),
    "all too long": ("events.csv", f"{HEADER}\n{ROW},1\n", "rows with more values than columns"),
    "a word": ("events.csv", with_value("PRI_met", "high"), "not numbers in the column 'PRI_met'"),
    "true": ("events.csv", f"{HEADER}\n{ROW.replace('0.1', 'True')}\n", "not numbers in the"),
    "infinity": ("events.csv", with_value("PRI_met", "inf"), "not numbers in the column 'PRI_met'"),
    "no value": ("events.csv", with_value("PRI_met", ""), "not numbers in the column 'PRI_met'"),
    "no weight": (
        "events.csv", f"{HEADER},Weight\n{ROW},1.0\n{ROW},\n", "'Weight': leave out the rows",
    ),
    "a fraction": ("events.csv", with_value("PRI_jet_num", "2.5"), "fractions in the column 'PRI_"),
    "a large count": ("events.csv", with_value("PRI_jet_num", str(2**31)), "numbers of 2147483648"),
    "a huge id": ("events.csv", with_value("EventId", str(2**63)), "numbers of 92233720368547758"),
    "an inexact id": ("events.csv", with_value("EventId", f"{2**53}.0"), "of 9007199254740992 or"),
    "another class": ("events.csv", with_value("Label", "t"), "other than s and b in the column"),
    "quotes around lines": (
        "events.csv",
        "\n".join(CERN_TEXT.replace(",t,", ',"t,', 1).replace(",t,", ',t",', 1).splitlines()[:9]),
        "values other than t, b, v, u in the column 'KaggleSet'",
    ),
    "two in a zip": ("events.zip", zipped(TEXT, TEXT), "is a ZIP archive of 2 files: unpack it"),
    "half a zip": ("events.zip", zipped(TEXT)[:-9], r"can't be read as CSV \(File is not a zip"),
    "half a gzip": ("events.csv.gz", gzip.compress(TEXT.encode())[:-9], "can't be read as CSV"),
    "half a zstd": ("events.csv", zstandard.compress(TEXT.encode())[:-9], "data has no end"),
    "one block of a zstd": ("events.csv", zstandard_block(TEXT), "data has no end"),
    "UTF-16": ("events.csv", TEXT.encode("utf-16"), "write it as UTF-8"),
    "a hole": ("events.csv", with_value("PRI_met", "1.5\0" "7"), "has zero bytes"),
    "a hole in a gzip": (
        "events.csv.gz", gzip.compress(with_value("PRI_met", "1.5\0" "7").encode()),
        "has zero bytes",
    ),
}


def test_a_package_that_a_file_needs_is_named(tmp_path, monkeypatch):
    """Whoever lacks the package for a kind of compression doesn't download the file again."""
    path = tmp_path / "events.csv.zst"
    path.write_bytes(zstandard.compress(TEXT.encode()))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"csv\.zst needs the package zstandard .*: install it"):
        higgs.read_events(path)


@pytest.mark.parametrize("name, content, message", REFUSED.values(), ids=REFUSED)
def test_pandas_and_spark_refuse_the_same_files(spark, tmp_path, name, content, message):
    """What one reader refuses, the other refuses with the same sentence."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as in_pandas:
        higgs.read_events(path)
    with pytest.raises(ValueError, match=message) as in_spark:
        higgs.read_events_in_spark(spark, path)
    assert str(in_spark.value) == str(in_pandas.value)
    assert str(path) in str(in_spark.value) and "\n" not in str(in_spark.value)


@pytest.mark.parametrize("name", ["events.csv", "."])
def test_pandas_and_spark_want_a_file(spark, tmp_path, name):
    """A missing file and a folder are refused with the same sentence."""
    for read in (higgs.read_events, partial(higgs.read_events_in_spark, spark)):
        with pytest.raises(FileNotFoundError, match=r"There is no file .*generate_events"):
            read(tmp_path / name)


def test_significance_is_the_challenges(tmp_path):
    """At every threshold, the significance follows the challenge's formula."""
    generator = np.random.default_rng(1)
    scores, is_signal = generator.random(500).round(2), generator.random(500) < 0.3
    weights = generator.random(500)
    thresholds, values = higgs.significance_curve(scores, is_signal, weights)
    assert (np.diff(thresholds) < 0).all()
    for threshold, value in zip(thresholds, values, strict=True):
        chosen = scores >= threshold
        s = 692 * weights[chosen & is_signal].sum() / weights[is_signal].sum()
        b = 411_000 * weights[chosen & ~is_signal].sum() / weights[~is_signal].sum()
        expected = np.sqrt(2 * ((s + b + 10) * np.log(1 + s / (b + 10)) - s))
        assert value == pytest.approx(expected)


def test_weights_that_cancel_out_have_no_negative_sum():
    """Weights whose sum is 0 give a significance, although their floats add up to a bit less."""
    weights = [0.7, 0.1, -0.8, 1.0, 1.0]
    _, values = higgs.significance_curve([0.9, 0.8, 0.7, 0.6, 0.5], [True] * 4 + [False], weights)
    assert values[2] == 0


@pytest.mark.parametrize(
    "scores, is_signal, weights, reason",
    [
        ([0.9, float("nan")], [True, False], [1, 1], "a score or a weight is not a finite number"),
        ([0.9, 0.1], [True, False], [1, float("inf")], "a score or a weight is not a finite"),
        ([0.9, 0.1], ["s", "b"], [1, 1], "is_signal has <U1: give it as booleans"),
        ([0.9, 0.1], [True, True], [1, 1], "one class has no weight"),
        ([0.9, 0.8, 0.7, 0.6], [True] * 3 + [False], [0.1, 0.2, -0.3, 1], "one class has no"),
        ([], np.zeros(0, bool), [], "one class has no weight"),
        ([0.9, 0.1, 0.2], [True, False, False], [1, 1, -3], "have a negative sum"),
        ([0.9, 0.1], [True, False], [1, 1, 1], r"\(2,\), \(2,\) and \(3,\): give one score"),
    ],
)
def test_a_significance_needs_scores_and_both_classes(scores, is_signal, weights, reason):
    """An event without a score is refused, as it would count as the likeliest signal."""
    with pytest.raises(ValueError, match=reason):
        higgs.significance_curve(scores, is_signal, weights)
