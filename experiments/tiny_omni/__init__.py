"""The recipe that builds the embedded model: ``python -m experiments.tiny_omni.train``."""

import os

# Has to be set before torch is imported. Spinning threads make small matrix products ten times
# slower as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
