"""Judge maps beyond fidelity: perturbation, localisation, sanity checks, statistics, and the report of them all."""
