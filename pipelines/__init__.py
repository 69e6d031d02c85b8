"""The jobs on Ray, storage and MLflow: everything between jobs/ and the mathematics of ddpm_core."""

import os

# Read by libgomp when torch is loaded, which is later. Threads that wait for each other's part of an operation spin for
# milliseconds by default: on a machine with anything else to do they spin away the time of the very thread that they
# wait for. Threads that sleep at once take twice as long on a quiet machine. This many turns cost nothing there and
# less here (docs/numbers.md).
THREADS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
if THREADS[0] not in os.environ:
    os.environ.setdefault(THREADS[1], "10000")
