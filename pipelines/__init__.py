"""The jobs on Ray, storage and MLflow: everything between jobs/ and the mathematics of ddpm_core."""

import os

# Read when torch is loaded, which is later. Threads that wait for each other's part of an operation spin by default;
# on a machine with anything else to do they spin away the time of the very thread that they wait for: a training step
# of the digits took 1.7 s instead of 0.15 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
