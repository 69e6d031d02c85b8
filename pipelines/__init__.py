"""The jobs on Ray, storage and MLflow: everything between jobs/ and the mathematics of ddpm_core."""
