"""Events of the Higgs boson challenge: columns, files, and a generator of similar events.

The ATLAS collaboration published simulated proton-proton collisions for the 2014 Higgs boson
machine learning challenge. Each event has 30 features: quantities measured by the detector
(``PRI_``, primitive) and quantities that physicists compute from them (``DER_``, derived). The task
is to distinguish decays of a Higgs boson into two tau leptons (signal, ``s``) from other processes
that look similar (background, ``b``).

`read_events` reads the published files. `generate_events` draws similar events from a simplified
physics model, so that the tutorial needs no download.

References
----------
.. [1] C. Adam-Bourdarios et al., "Learning to discover: the Higgs boson machine learning
   challenge", 2014. The appendix describes the features. Published with the results in PMLR 42,
   pages 19-55, 2015, http://proceedings.mlr.press/v42/cowa14.html
.. [2] ATLAS collaboration, "Dataset from the ATLAS Higgs Boson Machine Learning Challenge 2014",
   CERN Open Data record 328, https://doi.org/10.7483/OPENDATA.ATLAS.ZBP2.M5T8
"""

from helpers.higgs.columns import (
    BOOKKEEPING,
    EVENT_ID,
    FEATURES,
    INTEGERS,
    LABEL,
    LABELS,
    MISSING,
    SCHEMA,
    SOURCE,
)
from helpers.higgs.files import read_events, read_events_in_spark
from helpers.higgs.generator import PROCESSES, generate_events
from helpers.higgs.kinematics import derive_columns
from helpers.higgs.significance import (
    EXPECTED_BACKGROUND,
    EXPECTED_SIGNAL,
    significance,
    significance_curve,
)
